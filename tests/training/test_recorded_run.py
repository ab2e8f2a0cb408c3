"""Training on recorded text: `oprd rollout` writes it, `rollout.engine: file` reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from oprd_megatron.config import parse_config
from oprd_megatron.rollout.record import record_rollouts
from tests.ranks import run_ranks
from tests.training.runs import changed, train_on_rank, train_records, train_run, with_layout


def recorded(values: dict[str, Any], out: Path, steps: int = 3) -> dict[str, Any]:
    """The run on text that the untrained student wrote."""
    config = parse_config(values, "test")
    record_rollouts(config, config.student.path, out, steps)
    return changed(values, rollout={"engine": "file", "file": str(out), "mismatch": {"every": 1}})


@pytest.mark.parametrize("layout", [{}, {"tp": 2}], ids=["single", "tp2"])
def test_a_run_on_recorded_text(tmp_path: Path, values: dict[str, Any], layout: dict[str, int]) -> None:
    """The first step is that of the run which writes its own text; later ones are on text that is older, step by step, and the
    mismatch grows. Evaluation goes on, without the student's answers, and nothing is probed."""
    own = train_run(changed(values, run={"dir": str(tmp_path / "own")}))
    run = train_run(with_layout(recorded(values, tmp_path / "text.parquet"), **layout))
    records, wanted = train_records(run), train_records(own)
    assert records[0]["loss"] == pytest.approx(wanted[0]["loss"], rel=1e-5)
    assert records[1]["loss"] != pytest.approx(wanted[1]["loss"], rel=1e-5)
    assert [record["staleness"] for record in records] == [0, 1, 2]
    assert (
        records[0]["mismatch"]["max_abs"] < 1e-4 < records[1]["mismatch"]["max_abs"] < records[2]["mismatch"]["max_abs"]
    )
    assert "probe_difference" not in records[0]
    assert all("samples" not in record for record in train_records(run, "eval"))


def test_too_few_steps_are_seen_before_models_load(tmp_path: Path, values: dict[str, Any]) -> None:
    """In one line that says how far the file goes."""
    values = recorded(values, tmp_path / "text.jsonl", steps=2)
    with pytest.raises(AssertionError, match=r"step 2 has 0 of 8; run\.steps 3 needs 3 x 4 x 2 responses"):
        run_ranks(1, train_on_rank, values)
    assert not Path(values["run"]["dir"]).exists()
