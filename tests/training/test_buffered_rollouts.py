"""A run that dies after it has written text does not write it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import oprd_megatron.rollout.build
import oprd_megatron.trainer
from oprd_megatron.rollout import HFEngine, Request, SamplingParams
from oprd_megatron.rollout.probe import PROBE_STEP
from tests.ranks import run_ranks
from tests.training.runs import changed, student_tensors, train_on_rank, train_run, with_layout

ASKED: list[tuple[int, int]] = []
"""(step, sample index) of every request that reached an engine of this process, but for probes and evaluation."""


class Counting(HFEngine):
    """Notes what it is asked."""

    def start(self, requests: list[Request], params: SamplingParams, step: int) -> Any:
        if step != PROBE_STEP:
            ASKED.extend((step, request.sample_index) for request in requests)
        return super().start(requests, params, step)


class Died(Exception):
    """Stands for whatever ends a run between its rollouts and its update."""


def first_life(values: dict[str, Any], dies_in: int) -> None:
    """On a rank: die in the step `dies_in`, when its text is written."""
    study, steps = oprd_megatron.trainer.plan_shares, []

    def dies(*args: Any) -> Any:
        steps.append(1)
        if len(steps) == dies_in + 1:
            raise Died
        return study(*args)

    oprd_megatron.trainer.plan_shares = dies
    with pytest.raises(Died):
        train_on_rank(values)


def second_life(values: dict[str, Any]) -> list[tuple[int, int]]:
    """On a rank: go on, and say what engines were asked."""
    oprd_megatron.rollout.build.HFEngine = Counting
    train_on_rank(values)
    return ASKED


@pytest.mark.parametrize("layouts", [({}, {}), ({"tp": 2}, {"dp": 2})], ids=["single", "tp2-then-dp2"])
def test_text_outlives_the_run(
    tmp_path: Path, values: dict[str, Any], layouts: tuple[dict[str, int], dict[str, int]]
) -> None:
    """Killed in step 2 of 3, with a checkpoint after step 1: step 2's text is read, also by another layout, step 3's is
    written, and the student is that of a run which was not disturbed. What a checkpoint covers is deleted."""
    values = {**changed(values, run={"steps": 3}), "checkpoint": {"every": 1}, "eval": None}
    before, after = (with_layout(values, **layout) for layout in layouts)
    ranks = 2 if layouts[0] else 1
    run_ranks(ranks, first_life, before, 1)
    folder = Path(values["run"]["dir"]) / "rollouts"
    assert {path.name.split(".")[0] for path in folder.iterdir()} == {"step_000001"}
    asked = [request for rank in run_ranks(ranks, second_life, after) for request in rank]
    assert sorted(asked) == [(2, sample) for sample in range(8)]
    assert not list(folder.iterdir())
    whole = train_run(with_layout(changed(values, run={"dir": str(tmp_path / "whole")}), **layouts[0]))
    found = student_tensors(Path(values["run"]["dir"]))
    for name, tensor in student_tensors(whole).items():
        assert (tensor - found[name]).abs().max().item() <= 1e-5, name


def test_another_run_writes_its_own(values: dict[str, Any]) -> None:
    """With another learning rate the version's weights are others, so its text is written again."""
    values = {**changed(values, run={"steps": 3}), "checkpoint": {"every": 1}, "eval": None}
    run_ranks(1, first_life, values, 1)
    asked = run_ranks(1, second_life, changed(values, optimizer={"lr": 5e-4}))[0]
    assert sorted(asked) == [(step, sample) for step in (1, 2) for sample in range(8)]
