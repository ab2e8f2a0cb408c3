"""Two builds of one teacher on the same text: how far one's states are from the other's, layer by layer.

    all      each build by itself: what the noise of all layers before has come to            (`error`, `cosine`, `loss`)
    own      the second build, but every layer gets the first one's state as its input: what a layer adds by itself   (`own`)

`loss` is the representation loss between the two builds, in the space and with the normalisation of the run: the student's own
loss at a layer is the same quantity, so that the square root of their ratio says what share of the student's distance is noise.

Legend: N supervised tokens on this rank, D_T width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import cosine_similarity

from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.models import Model, run_schedule
from oprd_megatron.platform import Platform
from oprd_megatron.representation.batch import BatchPlan
from oprd_megatron.representation.feed import micro_batches
from oprd_megatron.representation.layer_map import LayerPair
from oprd_megatron.representation.loss import row_loss
from oprd_megatron.representation.rows import block_rows
from oprd_megatron.representation.taps import attached_taps

Place = tuple[int, int, int]
"""(chunk of the plan, layer, micro-batch)."""
OnBlock = Callable[[Place, torch.Tensor], torch.Tensor | None]
OfTeacher = Callable[[int, torch.Tensor], torch.Tensor]
"""The teacher's side of a space: (layer, states [N, D_T]) -> [N, width]."""


@dataclass(frozen=True)
class Noise:
    """Means over the supervised tokens, the same on every rank. The first three lists are over all layers of the teacher, the
    last three over `pairs`.

    Attributes:
        cosine, error: of the states, and the length of their difference over the first one's.
        own: what a layer by itself adds, relative to its output.
        pairs: supervised layers.
        space_cosine, space_error: the same as `cosine` and `error`, in the space where states are compared.
        loss: see the head of this module.
    """

    cosine: list[float]
    error: list[float]
    own: list[float]
    pairs: list[LayerPair]
    space_cosine: list[float]
    space_error: list[float]
    loss: list[float]

    @property
    def worst(self) -> list[int]:
        """Layers (1-based) that add noise of their own, those that add the most first."""
        order = sorted(range(len(self.own)), key=lambda index: -self.own[index])
        return [index + 1 for index in order if self.own[index] > 0]

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data; `layers` follows the supervised pairs, the rest all layers."""
        return {
            "cosine": self.cosine,
            "error": self.error,
            "own": self.own,
            "worst": self.worst,
            "layers": {
                "student": [pair.student_layer for pair in self.pairs],
                "teacher": [pair.teacher_layer for pair in self.pairs],
                "cosine": self.space_cosine,
                "error": self.space_error,
                "loss": self.loss,
            },
        }


def compare(
    first: Model,
    second: Model,
    plan: BatchPlan,
    pairs: Sequence[LayerPair],
    config: DistillConfig,
    of_teacher: OfTeacher,
    platform: Platform,
) -> Noise:
    """Run both builds over a batch. Collective over the world; one pass of the first, two of the second.

    Args:
        first, second: on one grid. The first one's states of the batch are kept in host memory.
        plan: of the batch, for that grid.
        pairs, config, of_teacher: of the run.
        platform: of the run.
    """
    depth = first.architecture.num_layers
    sums = torch.zeros(depth + len(pairs), 4, dtype=torch.float64)  # cosine, error, own or loss, rows
    if first.grid.is_member:
        states = keep_states(first, plan, config, platform)
        add_up(sums, states, second, plan, pairs, config, of_teacher, platform)
    dist.all_reduce(sums)
    means = sums / sums[:, 3:].clamp_min(1)
    of_layer, of_pair = means[:depth].T.tolist(), means[depth:].T.tolist()
    return Noise(of_layer[0], of_layer[1], of_layer[2], list(pairs), of_pair[0], of_pair[1], of_pair[2])


def keep_states(model: Model, plan: BatchPlan, config: DistillConfig, platform: Platform) -> dict[Place, torch.Tensor]:
    """Every layer's state of every micro-batch on this rank, [P_local, 1, D_T] in host memory."""
    states: dict[Place, torch.Tensor] = {}

    def keep(place: Place, hidden: torch.Tensor) -> None:
        states[place] = hidden.detach().to("cpu", copy=True)

    forward(model, plan, config, platform, keep)
    return states


def add_up(
    sums: torch.Tensor,
    states: dict[Place, torch.Tensor],
    model: Model,
    plan: BatchPlan,
    pairs: Sequence[LayerPair],
    config: DistillConfig,
    of_teacher: OfTeacher,
    platform: Platform,
) -> None:
    """Add this rank's tokens to `sums` (see `compare`)."""
    depth, device = model.architecture.num_layers, platform.device
    rows = [
        block_rows(chunk.teacher.tokens, np.arange(len(chunk.teacher.tokens.row)), model.grid, device)
        for chunk in plan.chunks
    ]

    def mine(place: Place, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.detach().to(device).flatten(0, 1)[rows[place[0]][place[2]].mine].float()

    def look(place: Place, hidden: torch.Tensor) -> None:
        chunk, layer, micro_batch = place
        if micro_batch not in rows[chunk]:
            return
        a, b = mine(place, states[place]), mine(place, hidden)
        sums[layer - 1] += torch.stack([*closeness(a, b), a.new_zeros(()), a.new_tensor(len(a))]).cpu()
        for number, pair in enumerate(pairs):
            if pair.teacher_layer == layer:
                p, q = (of_teacher(layer, side).float() for side in (a, b))
                loss = row_loss(p, q, config.normalization)
                sums[depth + number] += torch.stack([*closeness(p, q), loss, loss.new_tensor(len(a))]).cpu()

    def force(place: Place, hidden: torch.Tensor) -> torch.Tensor:
        chunk, layer, micro_batch = place
        if micro_batch in rows[chunk]:
            sums[layer - 1, 2] += float(closeness(mine(place, states[place]), mine(place, hidden))[1])
        return states[place].to(hidden)

    forward(model, plan, config, platform, look)
    forward(model, plan, config, platform, force)


def closeness(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over rows [N, D] of the cosine, and of |b - a| / |a|."""
    tiny = torch.finfo(torch.float32).tiny
    return cosine_similarity(a, b, dim=-1).sum(), ((b - a).norm(dim=-1) / a.norm(dim=-1).clamp_min(tiny)).sum()


def forward(model: Model, plan: BatchPlan, config: DistillConfig, platform: Platform, on_block: OnBlock) -> None:
    """Run a teacher over a batch; `on_block` sees, and may replace, every layer's state. Collective over its grid."""
    layers = range(1, model.architecture.num_layers + 1)
    for number, chunk in enumerate(plan.chunks):
        read = [sample.teacher_ids for sample in chunk.samples]
        fed = micro_batches(read, chunk.teacher.arrangement, model.grid)

        def on_state(layer: int, micro_batch: int, hidden: torch.Tensor, number: int = number) -> torch.Tensor | None:
            return on_block((number, layer, micro_batch), hidden)

        with attached_taps(model, layers, config.final_state, on_state):
            run_schedule(model, platform, fed, forward_only=True)
