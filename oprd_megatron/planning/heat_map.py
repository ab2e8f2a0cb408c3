"""Who sends how much to whom, as a picture: source rank x destination rank, in blocks where there are many ranks."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from oprd_megatron.evaluation.plots import STYLE
from oprd_megatron.planning.figures import RunPlan

MOST_CELLS = 256
"""Cells along an axis; more ranks than that are drawn in blocks of a power of two."""


def traffic_blocks(plan: RunPlan) -> tuple[np.ndarray, int]:
    """Bytes a step between blocks of ranks, [source, destination], and how many ranks a block has."""
    block = 2 ** max(0, math.ceil(math.log2(plan.world_size / MOST_CELLS)))
    cells = -(-plan.world_size // block)
    table = np.zeros((cells, cells), dtype=np.int64)
    for source, destination, number in plan.traffic.links:
        table[source // block, destination // block] += number
    return table, block


def draw_heat_map(plan: RunPlan, path: Path) -> None:
    """Write the png."""
    table, block = traffic_blocks(plan)
    with matplotlib.rc_context({**STYLE, "axes.grid": False, "figure.facecolor": "white"}):
        figure = Figure(figsize=(7.4, 6.2), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        shown = np.ma.masked_equal(table / 2**20, 0)
        end = len(table) * block - 0.5
        is_wide = shown.count() and shown.max() > 10 * shown.min()
        norm = LogNorm() if is_wide else Normalize(vmin=0)
        image = axis.imshow(shown, cmap="viridis", norm=norm, extent=(-0.5, end, end, -0.5), interpolation="nearest")
        for line in (axis.xaxis, axis.yaxis):
            line.set_major_locator(MaxNLocator(integer=True))
        cells = "" if block == 1 else f", {block} ranks a cell"
        states, outputs = bool(plan.pairs), plan.traffic.outputs is not None
        what = " and ".join(["teacher states"] * states + ["outputs" if states else "teacher outputs"] * outputs)
        axis.set(title=f"{what} sent in a step{cells}", xlabel="student rank", ylabel="teacher rank")
        if shown.count():
            figure.colorbar(image, ax=axis, label="MiB", aspect=30, pad=0.02)
        figure.savefig(path, format="png", dpi=130)
