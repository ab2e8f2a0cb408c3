"""A benchmark that a run asks while it trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from oprd_megatron.benchmarks.standalone import benchmark_student
from oprd_megatron.config.benchmark import BenchmarkConfig
from oprd_megatron.config.load import parse_config
from oprd_megatron.run_directory.lock import LOCK_FILE
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


def test_a_problem_that_the_student_has_no_room_for_is_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    """Before anything is written but the run's lock."""
    (tmp_path / "sums.json").write_text(json.dumps([{"problem": "say 1", "answer": "1"}]))
    asked = {"files": [str(tmp_path / "sums.json")], "samples": 2, "max_response_tokens": 510}
    with pytest.raises(AssertionError, match=r"ConfigError: .* a context of 512; lower benchmark.max_response_tokens"):
        train_run({**values, "benchmark": asked})
    assert [path.name for path in Path(values["run"]["dir"]).iterdir()] == [LOCK_FILE]


def test_a_checkpoint_is_asked_like_the_student_that_the_run_exports(tmp_path: Path, values: dict[str, Any]) -> None:
    """`--weights` takes the run, its checkpoint, or its Hugging Face directory: the same answers; nothing is left over."""
    (tmp_path / "sums.json").write_text(json.dumps([{"problem": "say 1", "answer": "1"}]))
    run = train_run(changed(values, optimizer={"lr": 1e-2}))
    before = sorted(path.name for path in run.iterdir())
    settings = BenchmarkConfig(files=[tmp_path / "sums.json"], samples=3, max_response_tokens=8)
    found = []
    for number, weights in enumerate((run, next(run.glob("checkpoints/iter_*3")), run / "student_hf", None)):
        out = tmp_path / str(number)
        benchmark_student(parse_config(values, "test"), settings, weights or Path(values["student"]["path"]), out)
        found.append(sorted((out / "responses.jsonl").read_text().splitlines()))
    assert found[0] == found[1] == found[2] != found[3]
    assert sorted(path.name for path in run.iterdir()) == before
