"""Two checkpoints on the same problems: differences with intervals and p-values, and the problems where they differ most.

Both are paired: a problem's difference is taken first, then differences are resampled (interval) or given random signs
(p-value). So problems that are hard for both add no noise.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from oprd_megatron.benchmarks.folder import Finished, aligned, read_folder
from oprd_megatron.benchmarks.intervals import interval, sign_flip_p
from oprd_megatron.benchmarks.measures import pass_at
from oprd_megatron.benchmarks.plots import draw_comparison
from oprd_megatron.benchmarks.results import MEASURES, SEED, ProblemResult, values_of
from oprd_megatron.errors import DataError
from oprd_megatron.logging import write_atomically

JSON_FILE, TABLE_FILE, PLOT_FILE = "comparison.json", "comparison.csv", "comparison.png"
MOST_SHOWN = 10
SHARES = ("accuracy", "truncated", "no_answer")
"""Measures that are shares of a problem's responses."""


@dataclass(frozen=True)
class Row:
    """One measure of one benchmark, before and after.

    Attributes:
        benchmark, measure: names; measure is a key of `MEASURES` or pass@j.
        before, after: means over problems that have the figure on both sides.
        difference, low, high: after - before and its 95 % interval; NaN where there is none.
        p: of the hypothesis that both are alike.
    """

    benchmark: str
    measure: str
    before: float
    after: float
    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Comparison:
    """Two folders side by side.

    Attributes:
        names: of the folders.
        rows: a benchmark's measures, and all benchmarks' together where there are several.
        differ: (before, after) of the problems whose accuracy differs, most first.
        accuracies: both sides', [P] each.
    """

    names: tuple[str, str]
    rows: list[Row]
    differ: list[tuple[ProblemResult, ProblemResult]]
    accuracies: tuple[np.ndarray, np.ndarray]


def compare(before: Path, after: Path) -> Comparison:
    """Compare two output folders.

    Raises:
        DataError: a folder is not complete, or they have other problems or right answers.
    """
    first, second = read_folder(before), read_folder(after)
    pairs = _paired(first, second)
    benchmarks = list(dict.fromkeys(left.benchmark for left, _ in pairs))
    rows = [row for name in benchmarks for row in _rows(name, [pair for pair in pairs if pair[0].benchmark == name])]
    if len(benchmarks) > 1:
        rows += _rows("all", pairs)
    accuracies = tuple(values_of(side, "accuracy") for side in zip(*pairs, strict=True))
    gaps = np.abs(accuracies[1] - accuracies[0])
    order = [index for index in np.argsort(-gaps, kind="stable") if gaps[index] > 0]
    names = (before.name, after.name) if before.name != after.name else (str(before), str(after))
    return Comparison(names, rows, [pairs[index] for index in order], (accuracies[0], accuracies[1]))


def write_comparison(found: Comparison, out: Path) -> None:
    """comparison.json, comparison.csv (each problem that differs) and comparison.png, in a folder that is made."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in vars(row).items()}
        for row in found.rows
    ]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["benchmark", "id", "gold", "correct_before", "samples_before", "correct_after", "samples_after",
                    "voted_before", "voted_after"])  # fmt: skip
    table.writerows(
        [a.benchmark, a.id, a.gold, a.correct, a.samples, b.correct, b.samples, a.voted, b.voted]
        for a, b in found.differ
    )
    write_atomically(out / TABLE_FILE, text.getvalue())
    last = found.rows[-1].benchmark
    shares = [
        row for row in found.rows if row.benchmark == last and row.measure != "tokens" and not math.isnan(row.low)
    ]
    drawn = [(_title(row.measure), row.difference, row.low, row.high) for row in shares]
    draw_comparison(found.names, *found.accuracies, drawn, out / PLOT_FILE)
    write_atomically(out / JSON_FILE, json.dumps({"names": found.names, "rows": rows}, indent=1))


def comparison_text(found: Comparison) -> str:
    """The comparison for a terminal."""
    table = [["", "", *found.names, "difference", "95 % interval", "p"]]
    for row in found.rows:
        digits = 1 if row.measure == "tokens" else 3
        shown = [f"{value:.{digits}f}" for value in (row.before, row.after)]
        bounds = "" if math.isnan(row.low) else f"[{row.low:+.{digits}f}, {row.high:+.{digits}f}]"
        table.append(
            [row.benchmark, _title(row.measure), *shown, f"{row.difference:+.{digits}f}", bounds, f"{row.p:.2g}"]
        )
    lines = [aligned(table)]
    if found.differ:
        lines.append(f"\n{len(found.differ)} of {len(found.accuracies[0])} problems differ; most:")
        lines.append(aligned([
            [f"  {a.benchmark}/{a.id}", f"{a.correct}/{a.samples}", "->", f"{b.correct}/{b.samples}", f"answer {a.gold[:40]}"]
            for a, b in found.differ[:MOST_SHOWN]
        ]))  # fmt: skip
    else:
        lines.append("\nno problem differs in accuracy")
    return "\n".join(lines)


def _paired(first: Finished, second: Finished) -> list[tuple[ProblemResult, ProblemResult]]:
    """The results of each problem, in the order of the first folder."""
    others = {(result.benchmark, result.id): result for result in second.results}
    own = {(result.benchmark, result.id) for result in first.results}
    alone = [key for key in others if key not in own] + [key for key in own if key not in others]
    if alone:
        raise DataError(
            f"{first.folder} and {second.folder}: {len(alone)} problems are in one of them only, such as {'/'.join(alone[0])}; "
            "run both on the same files and --limit"
        )
    pairs = [(result, others[result.benchmark, result.id]) for result in first.results]
    for left, right in pairs:
        if left.gold != right.gold:
            raise DataError(
                f"{first.folder} and {second.folder}: {left.benchmark}/{left.id} has the right answer {left.gold[:40]!r} in "
                f"one and {right.gold[:40]!r} in the other; run both on the same files"
            )
    return pairs


def _rows(benchmark: str, pairs: Sequence[tuple[ProblemResult, ProblemResult]]) -> list[Row]:
    """A benchmark's measures. Best@k and majority@k only where both sides have k samples of every problem; with fewer on one
    side, pass@j at the number that both have says what Best@k would."""
    before, after = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    counts = {result.samples for pair in pairs for result in pair}
    rows = []
    for name in MEASURES:
        if len(counts) > 1 and name in ("best", "majority", "dist_4g"):
            continue  # they grow or shrink with k
        unit = 1.0 if name == "best" else 1 / math.lcm(*counts) if name in SHARES else None
        rows.append(_row(benchmark, name, values_of(before, name), values_of(after, name), unit))
    if len(counts) > 1 and min(counts) > 1:
        values = [
            pass_at(np.array([r.correct for r in side]), np.array([r.samples for r in side]), min(counts))
            for side in (before, after)
        ]
        rows.append(_row(benchmark, f"pass@{min(counts)}", values[0], values[1], None))
    return rows


def _row(benchmark: str, measure: str, before: np.ndarray, after: np.ndarray, unit: float | None) -> Row:
    known = ~np.isnan(before) & ~np.isnan(after)
    before, after = before[known], after[known]
    if not len(before):
        return Row(benchmark, measure, *[math.nan] * 6)
    differences = after - before
    low, high = interval(differences, SEED)
    means = float(before.mean()), float(after.mean())
    p = sign_flip_p(differences, unit, SEED)
    return Row(benchmark, measure, *means, float(differences.mean()), low, high, p)


def _title(measure: str) -> str:
    return MEASURES.get(measure, measure)
