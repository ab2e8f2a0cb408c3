"""A whole run whose teacher and student are mixtures of experts: rollouts, weight sync, optimizer, checkpoints, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from oprd_megatron.config import parse_config
from oprd_megatron.errors import LayoutError
from oprd_megatron.preflight import preflight
from tests.training.runs import changed, student_tensors, tiny_run, train_records, with_layout
from tests.training.test_resume import assert_close, in_one_part, in_two_parts

TP2SP = {"tp": 2, "sp": True}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A run of six steps in one process, and its values."""
    folder = tmp_path_factory.mktemp("single")
    values = tiny_run(folder, "qwen3_moe")
    return values, in_one_part(values, {}, folder / "run")


def test_every_expert_is_trained_and_exported(single: tuple[dict[str, Any], Path]) -> None:
    """The export has the student's tensors under its names, one an expert, all of them moved; the loss falls."""
    values, run = single
    before, after = load_file(Path(values["student"]["path"]) / "model.safetensors"), student_tensors(run)
    assert before.keys() == after.keys() and "model.layers.3.mlp.experts.3.up_proj.weight" in after
    moved = {name for name in after if (after[name] - before[name]).abs().max().item() > 1e-4}
    assert {name for name in after if ".mlp." in name} <= moved
    losses = [record["loss"] for record in train_records(run)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("first", "second", "distributed"),
    [(TP2SP, {"pp": 2}, False), ({"pp": 2}, TP2SP, True), ({"dp": 2}, {}, True)],
    ids=str,
)
def test_resume_in_another_layout(
    tmp_path: Path,
    single: tuple[dict[str, Any], Path],
    first: dict[str, Any],
    second: dict[str, Any],
    distributed: bool,
) -> None:
    """Three steps in one layout and three in another, experts resharded on the way, are six in one process, to 1e-5."""
    values, run = single
    values = changed(values, optimizer={"distributed": distributed})
    assert_close(in_two_parts(values, first, second, tmp_path / "parts"), run)


def test_the_config_is_refused_before_anything_starts(single: tuple[dict[str, Any], Path]) -> None:
    """tp without sp, in the student's section alone."""
    values, _ = single
    with pytest.raises(LayoutError, match=r"set student\.parallel\.sp: true"):
        preflight(parse_config(with_layout(values, teacher={"tp": 2}, student={"tp": 2}), "test"), 2)
    preflight(parse_config(with_layout(values, teacher={"tp": 2}, student=TP2SP), "test"), 2, starts_run=False)
