"""Checkpoints: a run in two parts is the run in one part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from oprd_megatron.config import parse_config
from oprd_megatron.placing import build_models
from oprd_megatron.platform import select_platform
from oprd_megatron.preflight import preflight
from oprd_megatron.saving.checkpoint import latest_checkpoint, load_weights
from oprd_megatron.trainer import export_student
from tests.ranks import run_ranks
from tests.training.runs import changed, num_ranks, student_tensors, tiny_run, train_records, train_run, with_layout

PARTS = {"steps": 6, "stop_at": 3}

VPP = {"pp": 2, "vpp": 2}
DISJOINT = {"teacher": {"tp": 2, "ranks": "0-1"}, "student": {"pp": 2, "ranks": "2-3"}}
"""No rank has both models, and rank 0, which writes what is not a tensor, has no student."""


def in_two_parts(values: dict[str, Any], first: dict[str, Any], second: dict[str, Any], run_dir: Path) -> Path:
    """Three steps with the layout `first`, three more with the layout `second`."""
    values = changed(values, run={"dir": str(run_dir), **PARTS})
    train_run(with_layout(values, **first))
    assert (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "3"
    return train_run(changed(with_layout(values, **second), run={"stop_at": None}))


def in_one_part(values: dict[str, Any], layout: dict[str, Any], run_dir: Path) -> Path:
    return train_run(with_layout(changed(values, run={"dir": str(run_dir), "steps": 6}), **layout))


def assert_close(run_dir: Path, expected: Path) -> None:
    """Two runs export the same student to 1e-5: fp32 sums in another order, over six steps of Adam."""
    found, wanted = student_tensors(run_dir), student_tensors(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (tensor - found[name]).abs().max().item() <= 1e-5, name


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps in one process."""
    folder = tmp_path_factory.mktemp("single")
    return in_one_part(tiny_run(folder), {}, folder / "run")


def three_and_three_equal_six(values: dict[str, Any], layout: dict[str, Any], single: Path, folder: Path) -> None:
    whole = in_one_part(values, layout, folder / "whole")
    parts = in_two_parts(values, layout, layout, folder / "parts")
    for name, tensor in student_tensors(whole).items():
        assert torch.equal(tensor, student_tensors(parts)[name]), name
    losses = [[(r["step"], r["loss"], r["lr"]) for r in train_records(run)] for run in (whole, parts)]
    assert losses[0] == losses[1]
    assert [r["step"] for r in train_records(parts, "eval")] == [0, 2, 4, 6]
    assert_close(whole, single)


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}, {"dp": 2}, {"cp": 2}, VPP, DISJOINT], ids=str)
@pytest.mark.parametrize("distributed", [False, True], ids=["replicated", "distributed"])
def test_three_and_three_equal_six(
    tmp_path: Path, values: dict[str, Any], single: Path, layout: dict[str, Any], distributed: bool
) -> None:
    """Bit for bit in fp32: weights, losses and the metrics file's steps. And they are those of one process, to 1e-5."""
    three_and_three_equal_six(changed(values, optimizer={"distributed": distributed}), layout, single, tmp_path)


def test_three_and_three_equal_six_with_recomputation(tmp_path: Path, values: dict[str, Any], single: Path) -> None:
    """The same where backward computes every layer again."""
    values = changed(values, student={"recompute": {"granularity": "full"}})
    three_and_three_equal_six(values, {"pp": 2}, single, tmp_path)


@pytest.mark.parametrize("distributed", [False, True], ids=["replicated", "distributed"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"tp": 2}, {"pp": 2}),
        ({"pp": 2}, {"tp": 2}),
        ({}, {"tp": 2, "pp": 2}),
        ({"tp": 2}, {}),
        ({"dp": 2}, {"pp": 2}),
        (VPP, {"pp": 2}),
        ({"tp": 2}, VPP),
        ({"cp": 2}, {"dp": 2}),
        (DISJOINT, {"dp": 2}),
    ],
    ids=str,
)
def test_resume_in_another_layout(
    tmp_path: Path,
    values: dict[str, Any],
    single: Path,
    first: dict[str, Any],
    second: dict[str, Any],
    distributed: bool,
) -> None:
    """Weights after three steps in one layout and three in another are those of six in one, to 1e-5."""
    values = changed(values, optimizer={"distributed": distributed})
    assert_close(in_two_parts(values, first, second, tmp_path / "parts"), single)


def export_weights(values: dict[str, Any], checkpoint: Path, out: Path) -> None:
    """Read a checkpoint's weights as `oprd eval` does, and write them down."""
    config, platform = parse_config(values, "test"), select_platform("cpu")
    checked = preflight(config, dist.get_world_size(), starts_run=False)
    _, student = build_models(checked, platform)
    load_weights(checkpoint, student, platform)
    export_student(student, config.student.path, out / "student_hf", overwrite=False)


@pytest.mark.parametrize("layout", [VPP, DISJOINT], ids=str)
def test_weights_alone_load_in_any_layout(
    tmp_path: Path, values: dict[str, Any], single: Path, layout: dict[str, Any]
) -> None:
    """The weights of a checkpoint of one process come out of other layouts unchanged."""
    values = with_layout(values, **layout)
    run_ranks(num_ranks(values), export_weights, values, latest_checkpoint(single), tmp_path / "out")
    for name, tensor in student_tensors(single).items():
        assert torch.equal(tensor, student_tensors(tmp_path / "out")[name]), name
