"""Fits on gloo ranks, one case after the other in the same processes."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from oprd_megatron.bridge.fit import Stage1
from oprd_megatron.bridge.measure import HeldOutFigures, measure
from oprd_megatron.bridge.rows import split_rows
from oprd_megatron.bridge.stage1 import without_bridge
from oprd_megatron.config import RunConfig, parse_config
from oprd_megatron.placing import build_models
from oprd_megatron.platform import select_platform
from oprd_megatron.preflight import preflight
from oprd_megatron.representation.bridge import Bridge
from tests.bridge.stage1_reference import RANKS, pair_run, ragged_batches
from tests.parity.cases import parse


@dataclass(frozen=True)
class Fit:
    """A fit to run.

    Attributes:
        layout: "teacher > student", as in the parity matrix; `pack=N` sets micro_batch_tokens, `spool=N` the budget of a chunk.
        distill, bridge, run: keys of the config.
    """

    layout: str
    distill: dict[str, Any] = field(default_factory=dict)
    bridge: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)

    @property
    def world(self) -> int:
        return parse(self.layout).world

    def config(self, folder: Path) -> RunConfig:
        """Its run; positions: all."""
        case = parse(self.layout)
        values = pair_run(folder, distill={"positions": "all", "spool_bytes": case.spool_bytes, **self.distill},
                          bridge=self.bridge, run={"micro_batch_tokens": case.micro_batch_tokens, **self.run})  # fmt: skip
        for name, parallel in (("teacher", case.teacher), ("student", case.student)):
            values[name]["parallel"] = parallel.model_dump(exclude_defaults=True)
        values["distill"] |= {"mode": "linear"}
        return parse_config(values, "test")


@dataclass(frozen=True)
class Fitted:
    """What one rank has of a fit.

    Attributes:
        bridge: of the largest rank.
        figures: held out.
        variances: {teacher layer: [R]}, of the layers that this rank owns.
        seen: {student layer: (numbers of its rows, states [N, D_S], projected teacher states [N, R])} of the first
            batch.
        num_chunks: of the first batch.
    """

    bridge: Bridge
    figures: HeldOutFigures
    variances: dict[int, np.ndarray]
    seen: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]
    num_chunks: int


def fresh_world(folder: Path, name: str) -> None:
    """Drop the process groups of the case before."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/world_{size}_{name}", rank=rank, world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip


def build_stage(folder: Path, fit: Fit) -> Stage1:
    """Models, loaded on the grids of a fit."""
    platform, config = select_platform("cpu"), fit.config(folder)
    unbudgeted = without_bridge(config)
    checked = preflight(unbudgeted, dist.get_world_size(), starts_run=False)
    teacher, student = build_models(checked, platform)
    return Stage1(teacher, student, checked.pairs, config, platform)


def fit_on_ranks(folder: Path, fits: list[Fit]) -> list[Fitted]:
    """The three passes of each, and what the second saw."""
    found = []
    for number, fit in enumerate(fits):
        fresh_world(folder, str(number))
        stage = build_stage(folder, fit)
        config = stage.config
        rows = split_rows(ragged_batches(), config.bridge, config.distill, config.run.seed)
        bridge, owned = stage.directions(rows.train, RANKS[-1])
        bridge = Bridge(bridge.rank, bridge.means, bridge.teacher, stage.projections(rows.train, bridge))
        seen: dict[int, list[tuple[np.ndarray, ...]]] = {}

        def on_rows(layer: int, states: torch.Tensor, targets: torch.Tensor, tokens: np.ndarray, seen=seen) -> None:  # type: ignore[no-untyped-def]
            seen.setdefault(layer, []).append((tokens, states.numpy(), targets.numpy()))

        stage.run(rows.train[:1], bridge, bridge.project_teacher, on_rows)
        ranks = RANKS if config.bridge.solver == "ridge" else RANKS[-1:]
        found.append(
            Fitted(
                bridge,
                measure(stage, rows.held_out, bridge, ranks),
                {layer: part.variances.numpy() for layer, part in owned.items()},
                {layer: tuple(np.concatenate(p) for p in zip(*parts, strict=True)) for layer, parts in seen.items()},  # type: ignore[misc]
                len(stage._flow(bridge.rank, None).plan(rows.train[0]).chunks),
            )
        )
    return found
