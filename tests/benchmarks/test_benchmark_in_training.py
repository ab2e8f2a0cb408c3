"""A benchmark that a run asks while it trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import changed, train_records, train_run, with_layout

pytest.importorskip("math_verify")


@pytest.mark.parametrize("layout", [{}, {"pp": 2}], ids=["single", "pp2"])
def test_it_is_asked_before_between_and_after(tmp_path: Path, values: dict[str, Any], layout: dict[str, int]) -> None:
    """Its records stand beside those of the evaluation, with every measure; training is what it is without them."""
    problems = [{"problem": f"say {number}", "answer": str(number)} for number in range(3)]
    (tmp_path / "sums.json").write_text(json.dumps(problems))
    asked = {"files": [str(tmp_path / "sums.json")], "samples": 2, "max_response_tokens": 6, "every": 2}
    plain = with_layout(values, **layout)
    run = train_run({**changed(plain, run={"dir": str(tmp_path / "asked")}), "benchmark": asked})
    records = train_records(run, "benchmark")
    assert [record["step"] for record in records] == [0, 2, 3]
    for record in records:
        measures = record["benchmarks"]["sums"]
        assert measures["problems"] == 3 and 0 <= measures["accuracy"] <= measures["best"] <= 1
        assert 1 <= measures["tokens"] <= 6
    losses = [[record["loss"] for record in train_records(found)] for found in (run, train_run(plain))]
    assert losses[0] == losses[1]
