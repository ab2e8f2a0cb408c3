"""The report's figures: each function takes records and returns inline SVGs, one a panel; None where there is nothing to show.

The page lays panels out beside or below each other, so that they can be read on a phone. The SVGs are transparent and draw text
and axes in `currentColor`, so that the page's light or dark theme applies to them; the data's colours read well on both. They
refer to nothing outside the page. A long run is drawn as means over a few hundred pieces of it, with their extremes.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

Records = Sequence[dict[str, Any]]

BLUE, ORANGE, GREEN, GRAY = "#3b82f6", "#f08c1a", "#16a37b", "#8b95a5"
COLORS = (BLUE, ORANGE, GREEN, "#c65bcf", "#e5534b", "#c9a227", "#38b2c9", GRAY)
MOST_POINTS = 400
UNSPOKEN = "_nolegend_"
"""Label of what guides the eye and is not data."""
INK = "#0a0b0c"  # stands for currentColor until the SVG is written
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "text.parse_math": False,  # names come from configs and files
    "axes.axisbelow": True,
    "grid.alpha": 0.13,
    "lines.linewidth": 1.7,
    "lines.markersize": 4,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    **{key: INK for key in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")},
    "grid.color": INK,
}


def column(records: Records, *keys: str) -> np.ndarray:
    """One number of every record (nested by keys) as floats; NaN where it is missing or null."""
    values = []
    for record in records:
        node: Any = record
        for key in keys:
            node = node.get(key) if node else None
        values.append(np.nan if node is None else float(node))
    return np.array(values)


def training_seconds(train: Records) -> np.ndarray:
    """Seconds of each step: the sum of its phases."""
    return np.array([sum(record.get("seconds", {}).values()) for record in train])


def loss_plot(train: Records) -> str | None:
    """Training loss and mean cosine over steps."""
    if not train:
        return None
    with matplotlib.rc_context(STYLE):
        figures, (left, right) = make_axes(2)
        loss = column(train, "loss")
        line(left, train, loss, BLUE)
        log_if_wide(left, loss)
        line(right, train, column(train, "cosine"), GREEN)
        left.set(title="loss", xlabel="step")
        right.set(title="cosine, mean over layers", xlabel="step")
        return to_svg(figures)


def held_out_plot(train: Records, evals: Records) -> str | None:
    """KL (if there is one) and cross-entropy of every evaluation, over steps and over training time."""
    if not evals:
        return None
    steps, elapsed = column(train, "step"), np.cumsum(training_seconds(train))
    minutes = np.array([np.max(elapsed[steps <= record["step"]], initial=0.0) / 60 for record in evals])
    shown = [("kl", "KL(teacher || student), nats per token", BLUE), ("cross_entropy", "cross-entropy", ORANGE)]
    if np.isnan(column(evals, "kl")).all():  # models with different tokenizers have none
        shown = shown[1:]
    with matplotlib.rc_context(STYLE):
        figures, axes = make_axes(2 * len(shown))
        panels = ((of, x) for of in shown for x in ((column(evals, "step"), "step"), (minutes, "minutes of training")))
        for axis, ((key, title, color), (x, label)) in zip(axes, panels, strict=True):
            axis.plot(x, column(evals, key), color=color, marker="o")
            round_ticks(axis, x, integer=label == "step")
            axis.set(title=title, xlabel=label)
        return to_svg(figures)


def cosine_heat_map(train: Records, evals: Records) -> str | None:
    """Cosine of every layer over steps: left on the training rollouts, right on the held-out answers."""
    panels = [(title, _with_layers(records)) for title, records in (("training", train), ("held-out", evals))]
    panels = [(title, records) for title, records in panels if records]
    if not panels:
        return None
    grids = [_layer_grid(records, "cosine") for _, records in panels]
    lowest = min(float(np.nanmin(grid, initial=1.0)) for grid in grids)
    num_layers = max(len(grid) for grid in grids)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figures, axes = make_axes(len(panels), height=min(1.6 + 0.16 * num_layers, 7.0))
        for figure, axis, grid, (title, records) in zip(figures, axes, grids, panels, strict=True):
            image = axis.imshow(
                grid, aspect="auto", origin="lower", cmap="viridis", vmin=lowest, vmax=1.0, interpolation="nearest"
            )
            _label_ticks(axis.set_xticks, [record["step"] for record in records], most=8)
            _label_ticks(axis.set_yticks, records[-1]["layers"]["student"], most=14)
            axis.set(title=title, xlabel="step", ylabel="student layer")
            figure.colorbar(image, ax=axis, label="cosine", aspect=30, pad=0.02)
        return to_svg(figures)


def layers_plot(train: Records) -> str | None:
    """Norm ratio and mean squared error of every layer, at the first and the last step."""
    shown = _with_layers(train)
    if not shown:
        return None
    with matplotlib.rc_context(STYLE):
        figures, axes = make_axes(2)
        for axis, key, title in zip(
            axes, ("norm_ratio", "mse"), ("norm ratio, student / teacher", "mean squared error"), strict=True
        ):
            for record, color in ((shown[0], GRAY), (shown[-1], BLUE))[-len(shown) :]:
                values = _layer_grid([record], key)[:, 0]
                axis.plot(record["layers"]["student"], values, color=color, marker="o", label=f"step {record['step']}")
            axis.set(title=title, xlabel="student layer")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.legend()
        axes[0].axhline(1.0, color=INK, alpha=0.5, linewidth=1, linestyle="--", label=UNSPOKEN)
        log_if_wide(axes[1], _layer_grid([shown[0], shown[-1]], "mse"))
        return to_svg(figures)


def drift_plot(train: Records, evals: Records) -> str | None:
    """Share of the student's states that the bridge's projection sees, per layer: faint, their mean: bold; refits marked."""
    panels = [
        (title, [record for record in records if record.get("layers", {}).get("inside")])
        for title, records in (("training", train), ("held-out", evals))
    ]
    panels = [(title, records) for title, records in panels if records]
    if not panels:
        return None
    with matplotlib.rc_context(STYLE):
        figures, axes = make_axes(len(panels))
        for axis, (title, records) in zip(axes, panels, strict=True):
            steps, grid = column(records, "step"), _layer_grid(records, "inside")
            pieces = [piece_means(layer) for layer in grid]
            axis.plot(piece_means(steps), np.transpose(pieces), color=GRAY, alpha=0.35, linewidth=0.7, label=UNSPOKEN)
            line(axis, records, np.nanmean(grid, axis=0), BLUE)
            for record in records:
                if record.get("refitted"):
                    axis.axvline(record["step"], color=GREEN, linestyle=":", label=UNSPOKEN)
            axis.set(title=title, xlabel="step", ylabel="share inside the projection")
        return to_svg(figures)


def response_plot(train: Records) -> str | None:
    """Length of the sampled responses, and the share that ended by themselves."""
    if not train:
        return None
    with matplotlib.rc_context(STYLE):
        figures, (left, right) = make_axes(2)
        line(left, train, column(train, "response_length", "max"), GRAY, "longest")
        line(left, train, column(train, "response_length", "mean"), BLUE, "mean")
        left.set(title="response length, tokens", xlabel="step")
        from_zero(left)
        left.legend(loc="lower right")
        line(right, train, column(train, "response_length", "finished"), GREEN)
        right.set(title="finished before the limit, share", xlabel="step", ylim=(-0.03, 1.03))
        return to_svg(figures)


def optimizer_plot(train: Records) -> str | None:
    """Learning rate and gradient norm (before the clip) over steps."""
    if not train:
        return None
    with matplotlib.rc_context(STYLE):
        figures, (left, right) = make_axes(2)
        line(left, train, column(train, "lr"), BLUE)
        line(right, train, column(train, "grad_norm"), ORANGE)
        left.set(title="learning rate", xlabel="step")
        left.yaxis.set_major_formatter("{x:g}")
        right.set(title="gradient norm", xlabel="step")
        return to_svg(figures)


def make_axes(count: int, height: float = 2.7) -> tuple[list[Figure], list[Axes]]:
    """Panels of half the page's width: the figure of each, and its axes."""
    figures = [Figure(figsize=(4.6, height), layout="constrained") for _ in range(count)]
    return figures, [figure.subplots() for figure in figures]


def line(axis: Axes, records: Records, values: np.ndarray, color: str, label: str | None = None) -> None:
    """A line over steps, with markers while there are few points; of many, means and, faint, the extremes they stand for."""
    steps = column(records, "step")
    marker = "o" if len(records) <= 30 else None
    axis.plot(piece_means(steps), piece_means(values), color=color, label=label, marker=marker)
    if len(values) > MOST_POINTS:
        pieces = _pieces(values)
        low, high = (found.filled(np.nan) for found in (pieces.min(axis=1), pieces.max(axis=1)))
        axis.fill_between(piece_means(steps), low, high, color=color, alpha=0.2, linewidth=0)
    round_ticks(axis, steps)


def piece_means(values: np.ndarray) -> np.ndarray:
    """The values, or if they are more than `MOST_POINTS`, their means over as many pieces at most."""
    return values if len(values) <= MOST_POINTS else _pieces(values).mean(axis=1).filled(np.nan)


def _pieces(values: np.ndarray) -> Any:
    """[pieces, values of each], masked where there is none."""
    width = -(-len(values) // MOST_POINTS)
    missing = -len(values) % width
    return np.ma.masked_invalid(np.pad(values, (0, missing), constant_values=np.nan).reshape(-1, width))


def round_ticks(axis: Axes, values: np.ndarray, integer: bool = True) -> None:
    """Few, round ticks; a single value is the only one."""
    if len(values) == 1:
        axis.set_xticks(values)
    else:
        axis.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], min_n_ticks=1, integer=integer))


def from_zero(axis: Axes) -> None:
    """The values' scale begins at 0, and ends with some room."""
    axis.set_ylim(0, 1.1 * (axis.dataLim.y1 if axis.dataLim.y1 > 0 else 1.0))


def log_if_wide(axis: Axes, values: np.ndarray) -> None:
    """A log scale where positive values span more than a factor of ten."""
    lowest, highest = np.nanmin(values, initial=np.inf), np.nanmax(values, initial=0.0)
    if lowest <= 0 or highest <= 10 * lowest:
        return
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())


def _label_ticks(set_ticks: Any, labels: Sequence[int], most: int) -> None:
    """Ticks at the cells' indices, named by what the cells stand for; at most so many."""
    indices = range(0, len(labels), -(-len(labels) // most))
    set_ticks(indices, [str(labels[index]) for index in indices])


def _with_layers(records: Records) -> Records:
    """Those whose states were compared: a recipe's second stage may compare none."""
    return [record for record in records if record.get("layers", {}).get("student")]


def _layer_grid(records: Records, key: str) -> np.ndarray:
    """[layers, records], NaN where a value is null."""
    return np.array([record["layers"][key] for record in records], dtype=float).T


def to_svg(figures: Sequence[Figure]) -> str:
    """The figures as <svg> elements that stand alone inside an HTML page, and say in words what they show."""
    return "\n".join(map(_one_svg, figures))


def _one_svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=150, transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)  # HTML knows the SVG namespaces
    text = re.sub(r' id="[\w.]+_\d+"', "", text)  # numbered anew in each figure, and never referred to
    text = text.replace(INK, "currentColor")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(_in_words(figure.axes[0]))}"', 1)


def _in_words(axis: Axes) -> str:
    """What a panel shows, for those who cannot see it: its title, and where each line begins and ends."""
    lines = [line for line in axis.get_lines() if line.get_label() != UNSPOKEN]
    parts = [f"{axis.get_title('left')}, over {axis.get_xlabel()}"]
    for drawn in lines[:8]:
        values = np.asarray(drawn.get_ydata(), dtype=float)
        values = values[np.isfinite(values)]
        name = str(drawn.get_label())
        if len(values):
            parts.append(f"{'' if name.startswith('_') else name + ' '}from {values[0]:.3g} to {values[-1]:.3g}")
    return "; ".join(parts)
