"""`oprd export`: a run's checkpoint, read from its files, is the student that the run itself exported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from oprd_megatron.saving.export import export_checkpoint
from tests.training.runs import changed, student_tensors, tiny_run, train_run, with_layout


@pytest.mark.parametrize(
    ("family", "teacher", "student", "distributed"),
    [
        ("llama", {"ranks": "0-0"}, {"ranks": "1-2", "pp": 2, "vpp": 2}, False),
        ("qwen2", {"tp": 2}, {"tp": 2, "sp": True}, True),
        ("gemma3_text", {}, {"pp": 2}, False),
    ],
)
def test_a_checkpoint_of_any_layout(
    family: Any, teacher: dict[str, Any], student: dict[str, Any], distributed: bool, tmp_path: Path
) -> None:
    """Virtual stages on ranks of their own, sharded, tied embeddings on two stages: equal to the bit."""
    values = with_layout(tiny_run(tmp_path, family), teacher, student)
    values = changed(values, run={"steps": 1}, optimizer={"distributed": distributed})
    run_dir = train_run(values)
    export_checkpoint(run_dir, tmp_path / "out")
    found, expected = load_file(tmp_path / "out" / "model.safetensors"), student_tensors(run_dir)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
