"""Checkpoints: a run in two parts is the run in one part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runs import changed, student_tensors, train_records, train_run, with_layout

PARTS = {"steps": 6, "stop_at": 3}


def in_two_parts(values: dict[str, Any], first: dict[str, Any], second: dict[str, Any], run_dir: Path) -> Path:
    """Three steps with the layout `first`, three more with the layout `second`."""
    values = changed(values, run={"dir": str(run_dir), **PARTS})
    train_run(with_layout(values, **first))
    assert (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "3"
    return train_run(changed(with_layout(values, **second), run={"stop_at": None}))


def in_one_part(values: dict[str, Any], layout: dict[str, Any], run_dir: Path) -> Path:
    return train_run(with_layout(changed(values, run={"dir": str(run_dir), "steps": 6}), **layout))


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}, {"dp": 2}], ids=str)
@pytest.mark.parametrize("distributed", [False, True], ids=["replicated", "distributed"])
def test_three_and_three_equal_six(
    tmp_path: Path, values: dict[str, Any], layout: dict[str, Any], distributed: bool
) -> None:
    """Bit for bit in fp32: weights, losses and the metrics file's steps."""
    values = changed(values, optimizer={"distributed": distributed})
    whole = in_one_part(values, layout, tmp_path / "whole")
    parts = in_two_parts(values, layout, layout, tmp_path / "parts")
    for name, tensor in student_tensors(whole).items():
        assert torch.equal(tensor, student_tensors(parts)[name]), name
    losses = [[(r["step"], r["loss"], r["lr"]) for r in train_records(run)] for run in (whole, parts)]
    assert losses[0] == losses[1]
    assert [r["step"] for r in train_records(parts, "eval")] == [0, 2, 4, 6]


@pytest.mark.parametrize("distributed", [False, True], ids=["replicated", "distributed"])
@pytest.mark.parametrize(
    ("first", "second"),
    [({"tp": 2}, {"pp": 2}), ({"pp": 2}, {"tp": 2}), ({}, {"tp": 2, "pp": 2}), ({"tp": 2}, {}), ({"dp": 2}, {"pp": 2})],
    ids=str,
)
def test_resume_in_another_layout(
    tmp_path: Path, values: dict[str, Any], first: dict[str, Any], second: dict[str, Any], distributed: bool
) -> None:
    """Weights after three steps in one layout and three in another are those of six in one, to 1e-5."""
    values = changed(values, optimizer={"distributed": distributed})
    whole = in_one_part(values, {}, tmp_path / "whole")
    parts = in_two_parts(values, first, second, tmp_path / "parts")
    for name, tensor in student_tensors(whole).items():
        assert (tensor - student_tensors(parts)[name]).abs().max().item() <= 1e-5, name
