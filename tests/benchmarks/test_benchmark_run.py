"""A benchmark asks every problem k times, keeps what came, and writes what it found."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from oprd_megatron.benchmarks.folder import read_folder
from oprd_megatron.benchmarks.grading import Grader
from oprd_megatron.benchmarks.problems import Problem, read_problems
from oprd_megatron.benchmarks.recorded import grade_recorded
from oprd_megatron.benchmarks.responses import ResponseFile
from oprd_megatron.benchmarks.results import Response, grade_all
from oprd_megatron.config.benchmark import TEMPLATE, BenchmarkConfig
from oprd_megatron.errors import ConfigError, DataError
from oprd_megatron.rollout.recorded import open_recorded
from tests.benchmarks.scripted_engine import GIVEN, PROBLEMS, SAMPLES, ScriptedEngine, StartingEngine, benchmark

pytest.importorskip("math_verify")


@pytest.mark.parametrize("kind", [ScriptedEngine, StartingEngine])
def test_figures_are_those_of_the_script(tmp_path: Path, kind: type[ScriptedEngine]) -> None:
    """Two of four problems have one right response of three; a third is cut, a third has no answer. The vote on a solved
    problem is a tie of the right answer and a wrong one, so half a vote."""
    summary = benchmark(tmp_path, kind())
    found = summary["benchmarks"]["sums"]
    assert (found["problems"], found["samples"], found["stopped"]) == (4, 3, 0)
    values = {name: found[name]["value"] for name in ("accuracy", "best", "majority", "truncated", "no_answer")}
    assert values == pytest.approx(
        {"accuracy": 2 / 12, "best": 2 / 4, "majority": 1 / 4, "truncated": 1 / 3, "no_answer": 1 / 3}
    )
    assert {name: of["value"] for name, of in found["pass"].items()} == pytest.approx(
        {"1": 1 / 6, "2": 1 / 3, "3": 1 / 2}
    )
    assert found["accuracy"]["low"] <= 1 / 6 <= found["accuracy"]["high"]
    rows = read_folder(tmp_path / "out").results
    assert [(row.id, row.gold, row.correct, row.majority) for row in rows] == [
        ("1", "0", 1, 0.5), ("2", "1", 0, 0.0), ("3", "2", 1, 0.5), ("4", "3", 0, 0.0)
    ]  # fmt: skip
    assert rows[0].tokens == pytest.approx((len(GIVEN[0]) + len(GIVEN[1]) + 40) / 3)
    with (tmp_path / "out" / "answers.csv").open() as file:
        answers = list(csv.DictReader(file))
    assert [(answer["id"], answer["status"]) for answer in answers] == [
        (str(number), status) for number in (1, 2, 3, 4) for status in ("graded", "no answer", "graded")
    ]
    assert (tmp_path / "out" / "pass.png").read_bytes()[:4] == b"\x89PNG"


def test_wrong_answers_vote_apart() -> None:
    """Two right answers, equal only by value, win against three wrong ones; two wrong ones that are
    equal by value tie with them."""
    problem = Problem("b", "1", ({"role": "user", "content": "?"},), "1/2", "x")
    given = [r"\boxed{8}", r"\boxed{0.5}", r"\boxed{9}", r"\boxed{\frac12}", "no", r"\boxed{7}"]
    with Grader(num_workers=1) as grader:
        (result,), _ = grade_all([problem], [[Response(text, (1,), True) for text in given]], grader, boxed_only=True)
        assert (result.majority, result.voted, result.voted_share) == (1.0, "0.5", 2 / 6)
        alike = [Response(text, (1,), True) for text in [*given, r"\boxed{8.0}"]]
        (tied,), _ = grade_all([problem], [alike], grader, boxed_only=True)
        assert (tied.majority, tied.voted) == (0.5, "0.5")


def test_a_killed_benchmark_goes_on(tmp_path: Path) -> None:
    """SIGKILL within the writing, and a torn line on top: only what is missing is asked, and the result is that of one go."""
    command = [sys.executable, "-m", "tests.benchmarks.scripted_engine", str(tmp_path)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    path = tmp_path / "out" / "responses.jsonl"
    kept = path.read_text().splitlines()
    assert len(kept) == 5 and not (tmp_path / "out" / "summary.json").exists()
    with path.open("a") as file:
        file.write(kept[0][:40])
    engine = StartingEngine()
    summary = benchmark(tmp_path, engine)
    assert engine.written == list(range(5, PROBLEMS * SAMPLES)) and summary["generated"] == 7
    whole = tmp_path / "whole"
    whole.mkdir()
    assert benchmark(whole, StartingEngine())["benchmarks"] == summary["benchmarks"]
    assert path.read_text() == (whole / "out" / "responses.jsonl").read_text()
    again = StartingEngine()
    benchmark(tmp_path, again)
    assert again.written == []


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"temperature": 0.5}, "temperature 0.7, not 0.5"), ({"samples": 2}, "samples 3, not 2"), ({"seed": 1}, "seed"),
     ({"template": "{problem}!"}, "prompts"), ({"limit": 2}, "problems"), ({"weights": "v"}, 'weights "w", not "v"')],
)  # fmt: skip
def test_other_settings_are_refused(tmp_path: Path, changes: dict, key: str) -> None:
    """Responses that were made otherwise are never mixed in; the message names what differs. Reading answers in another way is
    not another way of making responses."""
    benchmark(tmp_path, StartingEngine())
    with pytest.raises(ConfigError, match=f"responses were made with {key}"):
        benchmark(tmp_path, StartingEngine(), **changes)
    again = StartingEngine()
    assert benchmark(tmp_path, again, boxed_only=False)["boxed_only"] is False and again.written == []


def test_one_process_a_folder(tmp_path: Path) -> None:
    """A second process is refused while the first writes, and a folder without settings is no benchmark's."""
    with ResponseFile(tmp_path / "a", {"k": 1}), pytest.raises(DataError, match="another process is writing here"):
        ResponseFile(tmp_path / "a", {"k": 1})
    ResponseFile(tmp_path / "a", {"k": 1})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "responses.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"without settings.json"):
        ResponseFile(tmp_path / "b", {})
    (tmp_path / "b" / "settings.json").write_text("{}")
    with pytest.raises(DataError, match=r"responses.jsonl:1: no field 'step'"):
        ResponseFile(tmp_path / "b", {})
    (tmp_path / "b" / "responses.jsonl").write_text("nonsense\n")
    with pytest.raises(DataError, match=r"responses.jsonl:1: not a response"):
        ResponseFile(tmp_path / "b", {})


def test_recorded_responses_are_graded_alike(tmp_path: Path) -> None:
    """responses.jsonl is a file of rollouts: graded by itself it has the figures of the benchmark that wrote it."""
    summary = benchmark(tmp_path, StartingEngine())
    path = tmp_path / "out" / "responses.jsonl"
    assert len(open_recorded(path).index.steps) == PROBLEMS * SAMPLES
    problems = read_problems([tmp_path / "sums.jsonl"])
    with Grader(num_workers=1) as grader:
        again = grade_recorded(path, problems, TEMPLATE, True, tmp_path / "again", grader)
        assert again["benchmarks"] == summary["benchmarks"]
        other = Problem("x", "1", ({"role": "user", "content": "?"},), "1", "x")
        fewer = grade_recorded(path, [*problems, other], TEMPLATE, True, tmp_path / "more", grader)
        assert fewer["left_out"] == 1
        with pytest.raises(DataError, match="response 4 answers 'What is 1 \\+ 0"):
            grade_recorded(path, problems[:1], TEMPLATE, True, tmp_path / "none", grader)


def test_settings_that_make_no_sense(tmp_path: Path) -> None:
    """Greedy answers that would all be the same, a template without a problem, two files of one name."""
    for changes, message in (
        ({"temperature": 0.0}, "would all be the same"),
        ({"template": "hello"}, "has no {problem}"),
        ({"files": [tmp_path / "a.json", tmp_path / "b" / "a.json"]}, "two are called 'a'"),
    ):
        with pytest.raises(ValueError, match=message):
            BenchmarkConfig(**{"files": [tmp_path / "a.json"], **changes})
