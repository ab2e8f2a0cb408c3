"""What the optimizer says of gradients: their norm, and where one is not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.training.runs import changed, num_ranks, with_layout
from tests.training.test_steps import make_trainer

HUGE = 1e6
"""No gradient here is as long: this clip clips nothing."""


def reported_norms(values: dict[str, Any], clips: list[float]) -> list[float]:
    """The norm that the first step reports under each clip, on a rank."""
    found = []
    for clip in clips:
        trainer = make_trainer(changed(values, optimizer={"clip_grad": clip}))
        found.append(trainer.step(0)["grad_norm"])
    return found


@pytest.mark.parametrize("distributed", [False, True], ids=["replicated", "distributed"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_norm_without_a_clip(values: dict[str, Any], dtype: str, distributed: bool) -> None:
    """clip_grad: 0 reports the norm that a clip above it does, of the gradients of this step."""
    models = {name: {"dtype": dtype, "parallel": {"dp": 2}} for name in ("teacher", "student")}
    values = changed(values, **models, optimizer={"distributed": distributed})
    for off, on in run_ranks(num_ranks(values), reported_norms, values, [0.0, HUGE]):
        assert 0 < on < HUGE and off == pytest.approx(on, rel=1e-6)


def named_bad_gradients(values: dict[str, Any]) -> dict[str, str | None]:
    """What is said of this rank's gradients: as they are, with a bad one in a map, and with one in a layer besides."""
    trainer = make_trainer(values)
    optimizer = trainer.optimizer
    assert optimizer is not None
    optimizer.zero_grad()
    trainer.alignment.run(
        trainer.alignment.plan(trainer.samples.of_student(trainer.text.rollouts(0))),
        train=True,
        chunks=optimizer.chunks,
    )
    found = {"none": optimizer.first_bad_gradient()}
    weight = trainer.alignment.space.weights.get(3)  # type: ignore[attr-defined]
    if weight is not None:
        weight.main_grad[0, 1] = torch.inf
        found["map"] = optimizer.first_bad_gradient()
        layer = trainer.student.chunks[0].decoder.layers[-1]
        layer.mlp.linear_fc2.weight.main_grad[1, 0] = torch.nan
        found["layer"] = optimizer.first_bad_gradient()
    return found


@pytest.mark.parametrize("parallel", [{"tp": 2}, {"pp": 2}], ids=["tp2", "pp2"])
def test_a_bad_gradient_of_a_map_is_named(values: dict[str, Any], parallel: dict[str, int]) -> None:
    """By its student layer, on the ranks that hold it; a parameter of the model goes first."""
    values = {**with_layout(values, **parallel), "distill": {"mode": "linear"}}
    ranks = run_ranks(2, named_bad_gradients, values)
    assert all(found["none"] is None for found in ranks)
    holders = [found for found in ranks if "map" in found]
    assert len(holders) == (2 if "tp" in parallel else 1)
    for found in holders:
        assert found["map"] == "student layer 3, state map"
        assert found["layer"] == "student layer 4, mlp.linear_fc2.weight"
