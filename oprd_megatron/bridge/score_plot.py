"""The scores of all layer pairs as a picture: CKA and held-out R2 side by side, with the map that was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oprd_megatron.bridge.layer_scores import LayerScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

INCHES_PER_LAYER = 0.11
"""Per teacher layer and per student layer, within the bounds below."""
PANEL_INCHES = (4.2, 9.0)
MOST_TICKS = 16
"""Layers named along an axis."""


def draw_scores(
    scores: LayerScores, path_of_map: Sequence[int | None], proportional_map: Sequence[int | None], out: Path
) -> None:
    """Write the png: teacher layers along, student layers up, both 1-based.

    Args:
        scores: of all student layers.
        path_of_map: the chosen teacher layer of each of `scores.student_layers`, None where unsupervised; drawn.
        proportional_map: the same for OPRD Eq. 11; dotted.
        out: where to; an existing file is replaced.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for layers in (path_of_map, proportional_map):
        assert len(layers) == len(scores.student_layers), f"{len(layers)} entries, {len(scores.student_layers)} layers"
    low, high = PANEL_INCHES
    width = min(max(INCHES_PER_LAYER * len(scores.teacher_layers), low), high)
    height = min(max(INCHES_PER_LAYER * len(scores.student_layers) * 1.4, low), high)
    with matplotlib.rc_context({"font.size": 9, "figure.facecolor": "white"}):
        figure = Figure(figsize=(2 * width + 1.6, height + 0.9), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 2, sharey=True)
        for axis, values, title in zip(panels, (scores.cka, scores.r2), ("CKA", "held-out R2"), strict=True):
            image = axis.imshow(np.clip(values, 0, None), cmap="viridis", origin="lower", aspect="auto", vmin=0)
            figure.colorbar(image, ax=axis, aspect=30, pad=0.01)
            _draw_map(axis, scores, proportional_map, color="white", linestyle=":", linewidth=1.6, label="proportional")
            _draw_map(
                axis, scores, path_of_map, color="#ff4d4d", marker="o", markersize=3.5, linewidth=1.2, label="chosen"
            )
            axis.set(title=f"{title} of block updates", xlabel="teacher layer")
            _name_layers(axis.xaxis, scores.teacher_layers)
            _name_layers(axis.yaxis, scores.student_layers)
        panels[0].set_ylabel("student layer")
        panels[0].legend(loc="upper left", framealpha=0.6, facecolor="#404040", labelcolor="white")
        figure.savefig(out, format="png", dpi=130)


def _draw_map(axis: Axes, scores: LayerScores, layers: Sequence[int | None], **style: Any) -> None:
    """A line through the pairs; it breaks at an unsupervised layer."""
    columns = {layer: column for column, layer in enumerate(scores.teacher_layers)}
    along = [np.nan if layer is None else columns[layer] for layer in layers]
    axis.plot(along, range(len(layers)), **style)


def _name_layers(axis: Axis, layers: Sequence[int]) -> None:
    """Ticks at whole layers, at most MOST_TICKS, with the layers' ids."""
    step = -(-len(layers) // MOST_TICKS)
    axis.set_ticks(range(0, len(layers), step), labels=[str(layer) for layer in layers[::step]])
