"""Plots of a benchmark, and of two checkpoints on it, as png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from oprd_megatron.benchmarks.results import ProblemResult, values_of

STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def draw_result(benchmarks: dict[str, dict[str, Any]], results: Sequence[ProblemResult], out: Path) -> None:
    """Left pass@j with its interval over j for each benchmark; right the problems' accuracies, hardest first."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name, of in benchmarks.items():
            if name == "all" and len(benchmarks) > 1:
                continue
            draws = [int(number) for number in of["pass"]]
            low, middle, high = (
                np.array([np.nan if point[key] is None else point[key] for point in of["pass"].values()])
                for key in ("low", "value", "high")
            )
            (drawn,) = left.plot(draws, middle, marker="o", markersize=4, label=f"{name} ({of['problems']})")
            left.fill_between(draws, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
            own = np.sort(values_of([result for result in results if result.benchmark == name], "accuracy"))
            right.step(np.linspace(0, 1, len(own) + 1), [own[0], *own], color=drawn.get_color(), label=name)
        left.set_xscale("log", base=2)
        left.xaxis.set_major_formatter("{x:g}")
        left.set(xlabel="j", ylabel="pass@j, 95 % interval over problems", ylim=(-0.03, 1.03))
        right.set(xlabel="share of problems, hardest first", ylabel="accuracy", ylim=(-0.03, 1.03))
        left.legend(loc="upper left")
        _save(figure, out)


def draw_comparison(
    names: tuple[str, str], before: np.ndarray, after: np.ndarray, rows: Sequence[Any], out: Path
) -> None:
    """Left each problem's accuracy under both checkpoints; right the differences of the measures that are shares.

    Args:
        names: of the checkpoints.
        before, after: accuracies, [P].
        rows: (title, difference, low, high).
        out: png.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        points, counts = np.unique(np.stack([before, after], axis=1), axis=0, return_counts=True)
        left.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
        left.scatter(points[:, 0], points[:, 1], s=14 + 10 * np.sqrt(counts), alpha=0.6)
        left.set(
            xlabel=f"accuracy of {names[0]}", ylabel=f"accuracy of {names[1]}", xlim=(-0.05, 1.05), ylim=(-0.05, 1.05)
        )
        left.set_title(f"{len(before)} problems; larger where several lie", fontsize=9)
        places = np.arange(len(rows))[::-1]
        middle = np.array([row[1] for row in rows])
        low, high = np.array([row[2] for row in rows]), np.array([row[3] for row in rows])
        right.axvline(0, color="grey", linestyle=":", linewidth=1)
        right.errorbar(middle, places, xerr=[middle - low, high - middle], fmt="o", markersize=4, capsize=3)
        right.set_yticks(places, [row[0] for row in rows])
        right.set(xlabel=f"{names[1]} minus {names[0]}, 95 % interval", ylim=(-0.6, len(rows) - 0.4))
        _save(figure, out)


def _save(figure: Figure, out: Path) -> None:
    staging = out.with_name(f".{out.name}")
    figure.savefig(staging, dpi=140, format="png")
    staging.replace(out)
