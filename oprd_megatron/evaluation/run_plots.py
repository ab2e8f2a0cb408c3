"""The report's figures about the run itself: where its time goes, what it holds in memory, and how its benchmarks go. As in
`plots.py`: records in, inline SVGs out, or None where there is nothing to show."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from oprd_megatron.evaluation.plots import (
    BLUE,
    COLORS,
    GRAY,
    ORANGE,
    STYLE,
    Records,
    column,
    from_zero,
    line,
    make_axes,
    piece_means,
    round_ticks,
    to_svg,
)

PHASES = ("rollout", "teacher", "exchange", "student", "optimizer", "sync", "probe")
"""Those that most runs have, each with a colour of its own."""
MOST_LINES = 8
"""Ranks that have a line each."""
BARS_UP_TO = 60


def time_plot(train: Records) -> str | None:
    """Seconds of every step, stacked by phase; and the median step, phase by phase."""
    names = list(dict.fromkeys(name for record in train for name in record.get("seconds", {})))
    if not names:
        return None
    steps = piece_means(column(train, "step"))
    seconds = [np.nan_to_num(column(train, "seconds", name)) for name in names]
    colors = [COLORS[PHASES.index(name)] if name in PHASES else GRAY for name in names]
    with matplotlib.rc_context(STYLE):
        figures, (left, right) = make_axes(2)
        heights = [piece_means(values) for values in seconds]
        if len(train) > BARS_UP_TO:
            left.stackplot(steps, heights, colors=colors, linewidth=0)
        else:
            for height, color, base in zip(heights, colors, np.cumsum([0 * steps, *heights[:-1]], axis=0), strict=True):
                left.bar(steps, height, bottom=base, color=color, width=0.85)
        left.margins(x=0.01)
        left.set(title="seconds per step", xlabel="step")
        round_ticks(left, steps)
        medians = [float(np.median(values)) for values in seconds]
        places = range(len(names))
        bars = right.barh(places, medians, color=colors)
        right.bar_label(bars, fmt="{:.3g}", padding=3, fontsize=9)
        right.set_yticks(places, names)
        right.invert_yaxis()
        right.margins(x=0.15)
        right.grid(False, axis="y")
        right.set(title="seconds of the median step", xlabel="seconds")
        return to_svg(figures)


def memory_plot(train: Records) -> str | None:
    """Memory of each rank over steps, of many ranks the highest, the mean and the lowest: held after a step, and at most."""
    records = [record for record in train if record.get("memory_mib")]
    if not records:
        return None
    with matplotlib.rc_context(STYLE):
        figures, axes = make_axes(2)
        for axis, key, title in zip(
            axes, ("held", "peak"), ("held after a step, GiB", "most so far, GiB"), strict=True
        ):
            _draw_ranks(axis, records, key)
            axis.set(title=title, xlabel="step")
            from_zero(axis)
            axis.legend(loc="lower right", ncols=2, fontsize=8)
        return to_svg(figures)


def _draw_ranks(axis: Axes, records: Records, key: str) -> None:
    most = max(len(record["memory_mib"][key]) for record in records)  # a resumed run may have other ranks
    grid = np.full((len(records), most), np.nan)
    for row, record in zip(grid, records, strict=True):
        row[: len(record["memory_mib"][key])] = np.array(record["memory_mib"][key]) / 1024
    if most <= MOST_LINES:
        for rank, color in zip(range(most), COLORS, strict=False):
            line(axis, records, grid[:, rank], color, f"rank {rank}")
        return
    for name, values, color in (
        ("highest", np.nanmax(grid, axis=1), ORANGE),
        ("mean", np.nanmean(grid, axis=1), BLUE),
        ("lowest", np.nanmin(grid, axis=1), GRAY),
    ):
        line(axis, records, values, color, f"{name} of {most} ranks")


def benchmark_plot(benchmarks: Records) -> str | None:
    """Avg@k with its interval, and Best@k, of every benchmark over steps."""
    names = list(dict.fromkeys(name for record in benchmarks for name in record["benchmarks"]))
    names = [name for name in names if name != "all" or len(names) == 1]
    if not names:
        return None
    with matplotlib.rc_context(STYLE):
        figures, (left, right) = make_axes(2)
        for name, color in zip(names, COLORS * len(names), strict=False):
            accuracy, half = (
                column(benchmarks, "benchmarks", name, key) for key in ("accuracy", "accuracy_half_interval")
            )
            line(left, benchmarks, accuracy, color, name)
            left.fill_between(
                column(benchmarks, "step"), accuracy - half, accuracy + half, color=color, alpha=0.15, linewidth=0
            )
            line(right, benchmarks, column(benchmarks, "benchmarks", name, "best"), color, name)
        for axis, title in ((left, "Avg@k, with its 95 % interval"), (right, "Best@k")):
            axis.set(title=title, xlabel="step", ylim=(-0.03, 1.03))
            axis.legend(fontsize=8)
        return to_svg(figures)
