"""Two folders side by side: the differences are right, and what cannot be compared is refused."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from oprd_megatron.benchmarks.compare import Comparison, compare, comparison_text, write_comparison
from oprd_megatron.benchmarks.folder import read_folder, write_folder
from oprd_megatron.benchmarks.grading import Grade
from oprd_megatron.benchmarks.intervals import interval, sign_flip_p
from oprd_megatron.benchmarks.problems import Problem
from oprd_megatron.benchmarks.results import ProblemResult, Response
from oprd_megatron.errors import DataError


def folder(path: Path, correct: Sequence[int], samples: int = 4, gold: str = "5", name: str = "aime") -> Path:
    """A folder of a benchmark with so many right responses of each problem, each of four different tokens."""
    path.mkdir()
    problems = [
        Problem(name, str(number), ({"role": "user", "content": "?"},), gold, "x") for number in range(len(correct))
    ]
    results = [
        ProblemResult(name, problem.id, gold, samples, count, float(count > 2), "5", 0.5, 1.0, 4.0 + count, 0.0, 0.0, 0)
        for problem, count in zip(problems, correct, strict=True)
    ]
    responses = [[Response("5", (1, 2, 3, 4), True)] * samples for _ in correct]
    grades = [[Grade(number < count, "5", "graded") for number in range(samples)] for count in correct]
    write_folder(path, problems, responses, results, grades, {})
    return path


def row(found: Comparison, measure: str):
    return next(row for row in found.rows if row.measure == measure)


BEFORE, AFTER = [0, 1, 2, 0, 4, 1], [2, 1, 3, 1, 4, 4]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    """problems.csv keeps every figure to the last bit, NaN included."""
    path = folder(tmp_path / "a", BEFORE)
    found = read_folder(path)
    assert [result.correct for result in found.results] == BEFORE and found.summary["benchmarks"]["aime"][
        "problems"
    ] == 6
    odd = ProblemResult("b", "1", 'a "quoted", {gold}', 3, 1, 1 / 3, "x\ny", 1 / 3, math.nan, 0.1, 0.2, 0.3, 1)
    write_folder(path, [], [], [odd], [], {})
    (back,) = read_folder(path).results
    assert str(back) == str(odd)


def test_differences_are_paired(tmp_path: Path) -> None:
    """Interval and p are those of the problems' differences; the problem that differs most comes first."""
    found = compare(folder(tmp_path / "a", BEFORE), folder(tmp_path / "b", AFTER))
    differences = (np.array(AFTER) - np.array(BEFORE)) / 4
    accuracy = row(found, "accuracy")
    assert accuracy.difference == pytest.approx(differences.mean())
    assert (accuracy.low, accuracy.high) == interval(differences, 0)
    assert accuracy.p == sign_flip_p(differences, 1 / 4) == 2 / 2**4  # four differ, all for the better
    assert row(found, "best").p == 2 / 2**2
    assert [(a.id, b.correct) for a, b in found.differ] == [("5", 4), ("0", 2), ("2", 3), ("3", 1)]
    text = comparison_text(found)
    assert "4 of 6 problems differ" in text and "aime/5" in text and "+0.292" in text


def test_a_folder_is_like_itself(tmp_path: Path) -> None:
    """No difference, p = 1, and nothing to show."""
    path = folder(tmp_path / "a", BEFORE)
    found = compare(path, path)
    assert all(one.difference == 0 and one.p == 1 for one in found.rows) and not found.differ
    assert "no problem differs" in comparison_text(found)


def test_numbers_of_samples_may_differ(tmp_path: Path) -> None:
    """Avg@k means the same for every k; Best@k does not, so pass@4 stands for it."""
    found = compare(folder(tmp_path / "a", BEFORE), folder(tmp_path / "b", [2 * count for count in AFTER], samples=8))
    assert row(found, "accuracy").difference == pytest.approx((np.array(AFTER) - np.array(BEFORE)).mean() / 4)
    measures = [one.measure for one in found.rows]
    assert "best" not in measures and "majority" not in measures and "pass@4" in measures


def test_written_comparison(tmp_path: Path) -> None:
    """Table, strict json and plot, also where there is one problem and so no interval."""
    for name, before, after in (("many", BEFORE, AFTER), ("one", [1], [2])):
        found = compare(folder(tmp_path / f"a-{name}", before), folder(tmp_path / f"b-{name}", after))
        out = tmp_path / name
        write_comparison(found, out)
        rows = list(csv.DictReader((out / "comparison.csv").open()))
        assert len(rows) == len(found.differ) and rows[0]["correct_after"] == str(max(after) if name == "many" else 2)
        record = json.loads((out / "comparison.json").read_text(), parse_constant=lambda text: pytest.fail(text))
        assert len(record["rows"]) == len(found.rows)
        assert (out / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    """Other problems, other right answers, folders that are not there, not finished or damaged: one line each."""
    first = folder(tmp_path / "a", BEFORE)
    cases = {
        "5 problems are in one of them only": folder(tmp_path / "b", [1]),
        "has the right answer '5' in one and '6'": folder(tmp_path / "c", AFTER, gold="6"),
        "12 problems are in one of them only": folder(tmp_path / "d", AFTER, name="amc"),
        "no summary.json": tmp_path / "missing",
    }
    damaged = folder(tmp_path / "e", AFTER)
    (damaged / "problems.csv").write_text((damaged / "problems.csv").read_text().replace("aime,3,5,4", "aime,3,5,four"))
    empty = folder(tmp_path / "f", AFTER)
    (empty / "problems.csv").write_text((empty / "problems.csv").read_text().splitlines()[0] + "\n")
    cases |= {"is damaged": damaged, "has no rows": empty}
    for message, other in cases.items():
        with pytest.raises(DataError, match=message) as error:
            compare(first, other)
        assert "\n" not in str(error.value)
