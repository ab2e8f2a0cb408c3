"""A case of the benchmark is the shape of both models and of the batch. Here are the shapes to choose from, the sweeps around
them, recorded rollouts as they are read from their file, and what is refused because it cannot work."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from oprd_megatron.errors import UserError

GIB, MIB = 2**30, 2**20
TERMS = ("topk", "sampled", "full")
TOP_K = 16


@dataclass(frozen=True)
class Case:
    """The shape of both models and of the batch.

    Attributes:
        varies: what this case is a point of: headline, length, width, vocabulary or terms.
        response, prompt: tokens of each of `responses` random rollouts, if there are no recorded ones in `rollouts`.
        k: OPRD supervises the last k response positions.
        terms: the losses of the opd and dense arms.
        recompute: activation recomputation of the student (mcore's term).
    """

    varies: str = "headline"
    layers: int = 2
    width: int = 1536
    vocab: int = 151_936
    response: int = 2048
    prompt: int = 64
    responses: int = 1
    k: int = 2000
    tied: bool = True
    dtype: Literal["fp32", "bf16"] = "fp32"
    optimizer: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    terms: tuple[str, ...] = ("topk",)
    rounds: int = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    rollouts: Path | None = None

    @property
    def arms(self) -> list[str]:
        """The arms, in the order in which they take turns."""
        return ["oprd", *(f"opd-{t}" for t in self.terms), *(f"dense-{t}" for t in self.terms), "release"]

    @property
    def parameters(self) -> int:
        """Parameters of one model; norms and biases are left out."""
        layer = self.width**2 * 2 + 2 * self.width * self.kv_width + 3 * self.width * self.ffn
        return self.layers * layer + self.vocab * self.width * (1 if self.tied else 2)

    @property
    def heads(self) -> int:
        return self.width // 128 if self.width >= 256 else 4

    @property
    def kv_width(self) -> int:
        return 2 * self.width // self.heads

    @property
    def ffn(self) -> int:
        """Qwen2-1.5B has 8960 for a width of 1536; other widths keep that proportion."""
        return 35 * self.width // 6

    def needed_bytes(self) -> int:
        """A rough upper estimate of what the case takes: resident, activations, and dense logits in fp32 six times."""
        size = 4 if self.dtype == "fp32" else 2
        resident = self.parameters * (2 * size + 4 + (12 if self.optimizer else 0))
        tokens = self.prompt + self.response
        return resident + tokens * (self.layers * 32 * self.width * size + 6 * 4 * self.vocab)

    def __str__(self) -> str:
        text = "recorded" if self.rollouts else f"{self.responses} x {self.response:,}"
        tied = "tied" if self.tied else "untied"
        return f"d {self.width}, V {self.vocab:,}, {self.layers} layers, {text} tokens, {self.dtype}, {tied}"


SHAPES = {
    "slice": Case(),
    "paper": Case(layers=28, response=16_384, prompt=256, responses=8, tied=False, dtype="bf16", optimizer=True),
    "tiny": Case(layers=2, width=32, vocab=300, response=48, prompt=8, responses=2, k=20, terms=TERMS),
}


def sweep(shape: str, headline: Case) -> list[Case]:
    """Cases that vary length, width and vocabulary one at a time around a middle one, which has all three terms."""
    if shape == "tiny":
        return []
    if shape == "paper":
        middle = replace(headline, response=4096, responses=2)
        lengths, widths, vocabs = (2048, 8192), (768, 1024), (32_768, 65_536)
    else:
        middle = replace(headline, layers=3, width=512, vocab=32_768, response=512)
        lengths, widths, vocabs = (256, 1024), (256, 1024), (8_192, 131_072)
    return [
        replace(middle, varies="terms", terms=TERMS),
        *(replace(middle, varies="length", response=length) for length in lengths),
        *(replace(middle, varies="width", width=width) for width in widths),
        *(replace(middle, varies="vocabulary", vocab=vocab) for vocab in vocabs),
    ]


def refuse(case: Case) -> None:
    """Raises UserError for a case that cannot work here."""
    import psutil
    import torch

    if case.width % (128 if case.width >= 256 else 8):
        raise UserError(f"--width {case.width}: give a multiple of 128 (below 256, of 8)")
    if case.vocab < TOP_K:
        raise UserError(f"--vocab {case.vocab}: top-{TOP_K} needs at least {TOP_K} tokens")
    unknown = set(case.terms) - set(TERMS)
    if unknown or not case.terms:
        raise UserError(f"--terms: {', '.join(sorted(unknown)) or 'none'}; choose of {', '.join(TERMS)}")
    if case.rollouts is not None:
        read_rollouts(case.rollouts, case.vocab)
    needed, available = case.needed_bytes(), psutil.virtual_memory().available
    on_cpu = case.device == "cpu" or (case.device == "auto" and not torch.cuda.is_available())
    if on_cpu and needed > available:
        raise UserError(
            f"{case}: needs about {needed / GIB:.0f} GiB and {available / GIB:.0f} are free; lower --response-tokens, "
            "--vocab or --layers"
        )


def read_rollouts(path: Path, vocab: int) -> list[tuple[list[int], list[int]]]:
    """The (prompt, response) ids in a file of `oprd rollout`.

    Raises:
        UserError: there is no such file, or a line is not a rollout of a model with this vocabulary.
    """
    if not path.is_file():
        raise UserError(f"--rollouts: there is no file {path}; `oprd rollout CONFIG --out FILE` writes one")
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        where = f"--rollouts: {path}, line {number}"
        try:
            record = json.loads(line)
            prompt, response = record["prompt_ids"], record["response_ids"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{where}: not json with prompt_ids and response_ids, as `oprd rollout` writes") from None
        if not prompt or not response:
            raise UserError(f"{where}: prompt or response is empty; leave the line out")
        if max(*prompt, *response) >= vocab:
            raise UserError(f"{where}: a token id is not below --vocab {vocab}; raise it")
        found.append((prompt, response))
    if not found:
        raise UserError(f"--rollouts: {path} is empty")
    return found
