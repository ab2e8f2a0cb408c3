"""The whole comparison: configs, then tensors, then what both models compute."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from checkpoints_conversion.convert.memory import peak_bytes
from checkpoints_conversion.convert.progress import Progress
from checkpoints_conversion.files.dtypes import ITEMSIZE
from checkpoints_conversion.verify.architectures import compare_architectures, compare_tokenizers, load_tokenizer
from checkpoints_conversion.verify.prompts import make_prompts
from checkpoints_conversion.verify.report import Report, SideSummary
from checkpoints_conversion.verify.sides import Side, open_side
from checkpoints_conversion.verify.states import (
    LogitsDifference,
    StateDifference,
    StateFile,
    compare_logits,
    compare_states,
)
from checkpoints_conversion.verify.streaming import OnState, Weights
from checkpoints_conversion.verify.tensors import compare_tensors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_LOGIT_TOKENS = 256
"""Tokens whose logits are compared, spread evenly; those of a large vocabulary take a megabyte a token."""


@dataclass(frozen=True)
class VerifyOptions:
    """The flags of `oprd convert verify`."""

    compute_dtype: Literal["fp32", "bf16"] = "fp32"
    tensors_only: bool = False
    tolerance: float | None = None
    """fp32: largest relative difference of a token's state, and of a tensor; bf16: largest KL, and of a tensor. None: the
    defaults, and no difference of a tensor that rounding does not explain."""
    num_tokens: int = 64
    prompts: Path | None = None
    like: Path | None = None


def verify(path_a: Path, path_b: Path, options: VerifyOptions, progress: Progress) -> Report:
    """Compare two models, each a Hugging Face directory, a .gguf file or a Megatron checkpoint.

    Raises:
        CheckpointError: one of them is not there, not understood, or torn.
        DataError: the prompts cannot be used.
    """
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        a = open_side(path_a, options.like, path_b, stack)
        b = open_side(path_b, options.like, path_a, stack)
        tokenizers = load_tokenizer(a.companions), load_tokenizer(b.companions)
        compared, tokenizer_differences = compare_tokenizers(*tokenizers)
        progress.phase("comparing tensors", _bytes_of(a))
        tensors = compare_tensors(a, b, progress.advance)
        report = Report(
            a=_summary(a),
            b=_summary(b),
            num_layers=a.arch.num_layers,
            architecture=compare_architectures(a.arch, b.arch),
            problems=[*a.problems, *b.problems],
            notes=[*a.notes, *b.notes],
            tokenizers=compared,
            tokenizer_differences=tokenizer_differences,
            tensors=tensors,
            compute_dtype=options.compute_dtype,
            tolerance=options.tolerance,
        )
        report.not_computed = _why_not(report, a, b, options)
        if report.not_computed is None:
            prompts = make_prompts(a.arch, tokenizers[0] or tokenizers[1], options.num_tokens, options.prompts)
            report.prompts = prompts.description
            _compare_meaning(report, a, b, prompts.batches, progress)
    progress.close()
    report.seconds = time.monotonic() - began
    report.peak_bytes = peak_bytes()
    return report


def _why_not(report: Report, a: Side, b: Side, options: VerifyOptions) -> str | None:
    if options.tensors_only:
        return "--tensors-only"
    if not report.tensors.is_complete:
        return "tensors are missing or have other shapes"
    if (a.arch.num_layers, a.arch.hidden_size, a.arch.vocab_size) != (
        b.arch.num_layers,
        b.arch.hidden_size,
        b.arch.vocab_size,
    ):
        return "the models have other shapes"
    return None


def _compare_meaning(report: Report, a: Side, b: Side, batches: list[torch.Tensor], progress: Progress) -> None:
    """Run A and keep its states on disk; run B and compare."""
    positions = [_spread(ids.numel()) for ids in batches]
    logits_unit = report.num_layers + 2
    states = [StateDifference() for _ in range(logits_unit + 1)]
    total = LogitsDifference()
    progress.phase("comparing states", len(batches) * (_bytes_of(a, computing=True) + _bytes_of(b, computing=True)))
    with StateFile() as kept:

        def compare(unit: int, theirs: torch.Tensor) -> None:
            nonlocal total
            mine = kept.next_like(theirs)
            states[unit] = states[unit].worse(compare_states(mine, theirs))
            if unit == logits_unit:
                total = total.joined(compare_logits(mine, theirs))

        for side, on_state in ((a, lambda unit, found: kept.append(found)), (b, compare)):
            weights = Weights(side, report.tensors.compute_dtypes, progress.advance)
            _run(side, weights, batches, positions, DTYPES[report.compute_dtype], on_state)
            kept.rewind()
    report.states, report.logits = states, total


def _run(
    side: Side,
    weights: Weights,
    batches: list[torch.Tensor],
    positions: list[torch.Tensor],
    dtype: torch.dtype,
    on_state: OnState,
) -> None:
    """By transformers or by mcore, whichever the side's format belongs to; each is slow to import."""
    if side.kind == "transformers":
        from checkpoints_conversion.verify.transformers_side import run_transformers as run
    else:
        from checkpoints_conversion.verify.megatron_side import run_megatron as run
    run(side, weights, batches, positions, dtype, on_state)


def _spread(num_tokens: int) -> torch.Tensor:
    """Up to `MAX_LOGIT_TOKENS` of them, evenly, the last among them."""
    count = min(num_tokens, MAX_LOGIT_TOKENS)
    return torch.arange(1, count + 1) * num_tokens // count - 1


def _bytes_of(side: Side, computing: bool = False) -> int:
    """Of all tensors; `computing`: without an embedding that is not the head, of which some rows are read."""
    left_out = {"model.embed_tokens.weight"} if computing and not side.arch.tie_word_embeddings else set()
    source = side.source
    return sum(math.prod(source.shape(name)) * ITEMSIZE[source.dtype(name)] for name in side.names - left_out)


def _summary(side: Side) -> SideSummary:
    dtypes = tuple(sorted({side.source.dtype(name) for name in side.names}))
    return SideSummary(str(side.path), side.format, side.arch.family, side.arch.num_layers, len(side.names), dtypes)
