"""The output folder of a benchmark.

summary.json    figures with intervals, and how they came about
problems.csv    a row for each problem (`results.ProblemResult`)
answers.csv     a row for each response: the answer that was read, and whether it is right
pass.png        pass@j over j, and accuracy problem by problem
responses.jsonl, settings.json    the texts (`responses`), where this command had them written
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from oprd_megatron.benchmarks.grading import Grade
from oprd_megatron.benchmarks.plots import draw_result
from oprd_megatron.benchmarks.problems import Problem
from oprd_megatron.benchmarks.results import MEASURES, ProblemResult, Response, summarise_each
from oprd_megatron.errors import DataError
from oprd_megatron.logging import write_atomically

SUMMARY_FILE, PROBLEMS_FILE, ANSWERS_FILE, PLOT_FILE = "summary.json", "problems.csv", "answers.csv", "pass.png"
KINDS = {"str": str, "int": int, "float": float}


@dataclass(frozen=True)
class Finished:
    """An output folder that is complete: its summary, and the rows of its table."""

    folder: Path
    summary: dict[str, Any]
    results: list[ProblemResult]


def write_folder(
    folder: Path,
    problems: Sequence[Problem],
    responses: Sequence[Sequence[Response]],
    results: Sequence[ProblemResult],
    grades: Sequence[Sequence[Grade]],
    about: dict[str, Any],
) -> dict[str, Any]:
    """Write everything but the texts; each file as a whole, the summary last. Returns the summary.

    Args:
        folder: is there.
        problems, responses, results, grades: [P], from `grade_all`.
        about: how the responses came about, for the summary.
    """
    summary = {"benchmarks": summarise_each(results), **about}
    names = [field.name for field in fields(ProblemResult)]
    write_atomically(folder / PROBLEMS_FILE, _csv([names, *([vars(row)[name] for name in names] for row in results)]))
    answers: list[list[Any]] = [
        ["benchmark", "id", "sample", "gold", "answer", "correct", "status", "tokens", "finished"]
    ]
    for problem, own, graded in zip(problems, responses, grades, strict=True):
        for number, (response, grade) in enumerate(zip(own, graded, strict=True)):
            answers.append(
                [problem.benchmark, problem.id, number, problem.gold, grade.answer or "", int(grade.correct), grade.status,
                 len(response.token_ids), int(response.finished)]
            )  # fmt: skip
    write_atomically(folder / ANSWERS_FILE, _csv(answers))
    draw_result(summary["benchmarks"], results, folder / PLOT_FILE)
    write_atomically(folder / SUMMARY_FILE, json.dumps(summary, indent=1))
    return summary


def read_folder(folder: Path) -> Finished:
    """What `write_folder` wrote.

    Raises:
        DataError: a file is missing or malformed.
    """
    for name in (SUMMARY_FILE, PROBLEMS_FILE):
        if not (folder / name).is_file():
            raise DataError(f"{folder}: no {name}; give a folder of `oprd eval run` that has come to its end")
    try:
        summary = json.loads((folder / SUMMARY_FILE).read_text())
        with (folder / PROBLEMS_FILE).open(newline="") as file:
            rows = [
                ProblemResult(
                    **{field.name: KINDS[str(field.type)](row[field.name]) for field in fields(ProblemResult)}
                )
                for row in csv.DictReader(file)
            ]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: {PROBLEMS_FILE} or {SUMMARY_FILE} is damaged ({error}); grade it again") from None
    if not rows:
        raise DataError(f"{folder}: {PROBLEMS_FILE} has no rows; grade it again")
    return Finished(folder, summary, rows)


def summary_text(summary: dict[str, Any]) -> str:
    """A summary as a table: a column for each benchmark, figures with their 95 % intervals."""
    benchmarks = summary["benchmarks"]
    rows = [["", *benchmarks], ["problems", *(str(of["problems"]) for of in benchmarks.values())]]
    rows.append(["samples each", *(str(of["samples"]) for of in benchmarks.values())])
    rows += [[title, *(_shown(of[name]) for of in benchmarks.values())] for name, title in MEASURES.items()]
    draws = sorted({int(number) for of in benchmarks.values() for number in of["pass"]})
    for number in draws:
        points = [of["pass"].get(str(number)) for of in benchmarks.values()]
        rows.append([f"pass@{number}", *("" if point is None else _shown(point) for point in points)])
    stopped = sum(of["stopped"] for name, of in benchmarks.items() if name != "all" or len(benchmarks) == 1)
    lines = aligned(rows)
    return f"{lines}\n{stopped} answers took too long to read, and count as wrong" if stopped else lines


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text with columns of equal width."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _shown(figure: dict[str, float | None]) -> str:
    value, low, high = figure["value"], figure["low"], figure["high"]
    if value is None:
        return "-"
    digits = 1 if value > 2 else 3  # lengths, shares
    return f"{value:.{digits}f}" if low is None else f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
