"""Recorded rollouts in place of an engine, for debugging and for off-policy baselines. Nothing is generated: a step's responses
are those that the file has for it, with the weight version that wrote them.

The student's weights have no part in it: a trainer need not sync them, cannot probe this engine, and does not apply its
bound on staleness.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from oprd_megatron.config.schema import RunConfig
from oprd_megatron.errors import ConfigError, DataError
from oprd_megatron.rollout.engine import Request, Rollout, SamplingParams, make_requests
from oprd_megatron.rollout.prompts import Prompt, PromptSource
from oprd_megatron.rollout.recorded import open_recorded
from oprd_megatron.rollout.recorded_row import Recorded


class FileEngine:
    """A `RolloutEngine` that looks its answers up.

    Args:
        path: what `oprd rollout` wrote.

    Attributes:
        index: which rows the file has.

    Raises:
        DataError: as `open_recorded`.
    """

    replica: int | None = None

    def __init__(self, path: Path) -> None:
        self._file = open_recorded(path)
        self.index = self._file.index

    def generate(self, requests: list[Request], params: SamplingParams, step: int) -> list[Rollout]:
        """The recorded response of each (step, sample index). Of `params` only the limits are looked at.

        Raises:
            DataError: there is none, it answers another prompt, has ids that are not in the vocabulary or more tokens than
                `max_response_tokens`, or its row is malformed.
        """
        index = self.index
        asked = [request.sample_index for request in requests]
        rows = np.flatnonzero((index.steps == step) & np.isin(index.samples, asked))
        found = {row.sample_index: row for row in self._file.read(rows)}
        return [self._answer(request, found.get(request.sample_index), params, step) for request in requests]

    def update_weights(self, version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Let the stream pass: making it may be collective. Nothing is kept."""
        for _ in tensors:
            pass

    def score(self, token_ids: list[list[int]]) -> list[torch.Tensor]:
        """Not there.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"rollout.engine: {self._file.path} holds recorded rollouts and no weights, so nothing can be scored; use another "
            "engine, or leave out what probes it"
        )

    def score_each(self, token_ids: list[list[int]]) -> dict[str, list[torch.Tensor]]:
        """Not there either: as `score`."""
        return {"": self.score(token_ids)}

    def checksums(self) -> dict[str, dict[str, int]]:
        """Of no weights."""
        return {}

    def close(self) -> None:
        """Nothing is held."""

    def _answer(self, request: Request, row: Recorded | None, params: SamplingParams, step: int) -> Rollout:
        place = f"{self._file.path}: step {step}, sample {request.sample_index}"
        if row is None:
            raise DataError(f"{place} is not there; record more steps with `oprd rollout --steps`, or lower run.steps")
        if row.prompt_ids != request.prompt.token_ids:
            raise DataError(
                f"{place} answers another prompt ({_short(row.prompt)}) than this run's ({_short(request.prompt.text)}); "
                "record it with this run's prompts, seed, prompts_per_step, responses_per_prompt and tokenizer"
            )
        highest = max(row.response_ids)
        if params.vocab_size is not None and highest >= params.vocab_size:
            raise DataError(f"{place} has {_outside(highest, params.vocab_size)}")
        if len(row.response_ids) > params.max_response_tokens:
            raise DataError(
                f"{place} has {len(row.response_ids)} response tokens, more than rollout.max_response_tokens "
                f"{params.max_response_tokens}; raise it, or record shorter responses"
            )
        return row.rollout(request.prompt.index)


def check_recorded(config: RunConfig, path: Path, vocab_size: int, prompts: list[Prompt] | None = None) -> None:
    """Before models load: the file has every response that the run will ask for. Of parquet, token columns are read only to
    hold the first step against `prompts`.

    Args:
        config: the run.
        path: the file.
        vocab_size: ids that the student may write.
        prompts: the run's; left out, a file of other prompts is found when its rows are read.

    Raises:
        DataError: as `open_recorded`; too few steps, other numbers of responses in a step, other prompts, or ids that are not
            in the vocabulary.
    """
    engine, section = FileEngine(path), config.rollout
    index = engine.index
    per_step = section.prompts_per_step * section.responses_per_prompt
    wanted = f"{section.prompts_per_step} x {section.responses_per_prompt} responses"
    needed = index.steps < config.run.steps
    more = np.flatnonzero(needed & (index.samples >= per_step))
    if len(more):
        raise DataError(
            f"{path}: step {index.steps[more[0]]} has a sample_index {index.samples[more[0]]}, but a step of this run has "
            f"{wanted}; set rollout.prompts_per_step and responses_per_prompt as they were when it was recorded"
        )
    counts = np.bincount(index.steps[needed], minlength=config.run.steps)
    short = np.flatnonzero(counts < per_step)
    if len(short):
        raise DataError(
            f"{path}: has {len(index.steps)} responses of {len(np.unique(index.steps))} steps, and step {short[0]} has "
            f"{counts[short[0]]} of {per_step}; run.steps {config.run.steps} needs {config.run.steps} x {wanted}: record more "
            f"with `oprd rollout --steps {config.run.steps}`, or set run.steps={short[0] or 1}"
        )
    if index.most_id is not None and index.most_id >= vocab_size:
        raise DataError(f"{path}: has {_outside(index.most_id, vocab_size)}")
    if prompts is not None:
        first = PromptSource(prompts, config.run.seed).batch(0, section.prompts_per_step)
        params = SamplingParams(max_response_tokens=section.max_response_tokens, vocab_size=vocab_size)
        engine.generate(make_requests(first, section.responses_per_prompt), params, step=0)


def _outside(token_id: int, vocab_size: int) -> str:
    return f"token id {token_id}, but the models share only ids below {vocab_size}; record it with this run's models"


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
