"""Which rows (supervised tokens) of the rollouts a fit sees, the same ones on every rank and in every layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from oprd_megatron.config.schema import BridgeConfig, DistillConfig
from oprd_megatron.errors import ConfigError, DataError
from oprd_megatron.representation.batch import Sample

TRAIN, HELD_OUT = 1, 2
"""Part of the random seed, so that both draws differ."""


@dataclass(frozen=True)
class FitRows:
    """Batches of samples, each with the rows that are used (`Sample.kept`); batches without any are left out.

    Attributes:
        train, held_out: of the fit, and of what measures it.
        num_train, num_held_out: rows.
    """

    train: list[list[Sample]]
    held_out: list[list[Sample]]
    num_train: int
    num_held_out: int


def split_rows(batches: Sequence[list[Sample]], config: BridgeConfig, distill: DistillConfig, seed: int) -> FitRows:
    """Hold out the last batches and draw rows from both parts.

    Args:
        batches: the student's responses, batch by batch, each as large as a training step's.
        config: `held_out` and `rows`.
        distill: which response tokens are supervised.
        seed: of the draw.

    Raises:
        ConfigError: one batch alone, which leaves nothing to hold out.
        DataError: no row in one of the parts.
    """
    if len(batches) < 2:
        raise ConfigError(
            "bridge.prompts: one step's prompts leave nothing to hold out; use at least twice rollout.prompts_per_step"
        )
    num_held_out = min(len(batches) - 1, max(1, round(config.held_out * len(batches))))
    parts = []
    for number, part, limit in (
        (TRAIN, batches[:-num_held_out], config.rows),
        (HELD_OUT, batches[-num_held_out:], max(1, round(config.held_out * config.rows))),
    ):
        parts.append(_draw(part, distill, limit, np.random.default_rng([seed, number])))
    counts = [sum(len(sample.positions(distill)[1]) for batch in part for sample in batch) for part in parts]
    if not all(counts):
        raise DataError(
            "bridge: the responses have no supervised token; check rollout.stop, prompts and distill.positions"
        )
    return FitRows(parts[0], parts[1], *counts)


def _draw(
    batches: Sequence[list[Sample]], distill: DistillConfig, limit: int, generator: np.random.Generator
) -> list[list[Sample]]:
    """Keep `limit` rows, every one as likely as any other."""
    counts = [len(sample.positions(distill)[1]) for batch in batches for sample in batch]
    stops = np.cumsum([0, *counts])
    chosen = np.arange(stops[-1])
    if len(chosen) > limit:
        chosen = np.sort(generator.choice(stops[-1], limit, replace=False))
    drawn, number = [], 0
    for batch in batches:
        kept = []
        for sample in batch:
            first, last = np.searchsorted(chosen, stops[number : number + 2])
            kept.append(replace(sample, kept=tuple((chosen[first:last] - stops[number]).tolist())))
            number += 1
        if any(sample.kept for sample in kept):
            drawn.append(kept)
    return drawn
