"""Stops a run whose loss or gradient is not finite, on every rank, and says where it came from."""

from __future__ import annotations

import math
from typing import Any

import torch.distributed as dist

from oprd_megatron.errors import TrainingDiverged
from oprd_megatron.lesson import Outcome
from oprd_megatron.optimizer import StudentOptimizer
from oprd_megatron.representation.loss import ALIGNMENT_FIELDS


def stop_on_bad_loss(step: int, outcome: Outcome, whose: str) -> None:
    """Before the update: name the term, or the rank and layer, of a loss that is not finite; `whose` goes before it."""
    for name, value in outcome.terms.items():
        if not math.isfinite(value):
            _stop(step, "loss", f"{whose}output term {name}")
    if math.isfinite(outcome.report.loss):
        return
    field = ALIGNMENT_FIELDS.index("loss")
    bad = [layer for layer, value in sorted(outcome.sums.items()) if not value[field].isfinite()]
    _stop(step, "loss", f"{whose}student layer {bad[0]}" if bad else None)


def stop_on_bad_gradient(step: int, grad_norm: float, optimizer: StudentOptimizer | None) -> None:
    """After the update, which is not saved: name the rank, layer and parameter of a gradient that is not finite."""
    if not math.isfinite(grad_norm):
        _stop(step, "gradient", optimizer.first_bad_gradient() if optimizer else None)


def _stop(step: int, what: str, here: str | None) -> None:
    """Raise on every rank with the first rank that found something. Collective."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, here)
    rank = next((rank for rank, place in enumerate(found) if place), 0)
    raise TrainingDiverged(
        f"step {step}: the {what} is not finite (rank {rank}, {found[rank] or 'place unknown'}); the last checkpoint is "
        "kept: lower optimizer.lr or look at the prompts of this step, then start again to resume from it"
    )
