"""The report's figures about next-token distributions, the terms of the loss, and where in a response states are alike. As in
`plots.py`: records in, inline SVGs out, or None where there is nothing to show."""

from __future__ import annotations

import matplotlib
import numpy as np

from oprd_megatron.evaluation.plots import (
    BLUE,
    COLORS,
    GRAY,
    GREEN,
    ORANGE,
    STYLE,
    Records,
    column,
    line,
    log_if_wide,
    make_axes,
    to_svg,
)


def terms_plot(train: Records, evals: Records) -> str | None:
    """Each term of the loss by itself, on the training rollouts and on the held-out answers; and gradient norms, if
    measured."""
    panels = [
        ("training", [record for record in train if record.get("terms")], "terms"),
        ("held-out", [record for record in evals if record.get("terms")], "terms"),
        ("gradient norm by itself", [record for record in train if record.get("gradient_norms")], "gradient_norms"),
    ]
    shown = [(title, records, key) for title, records, key in panels if records]
    if not any(title != "held-out" for title, _, _ in shown):  # the representation loss alone has a figure already
        return None
    every = dict.fromkeys(name for _, records, key in shown for record in records for name in record[key])
    colors = dict(zip(every, COLORS * len(every), strict=False))
    with matplotlib.rc_context(STYLE):
        figures, axes = make_axes(len(shown))
        for axis, (title, records, key) in zip(axes, shown, strict=True):
            names = [name for name in colors if any(name in record[key] for record in records)]
            for name in names:
                line(axis, records, column(records, key, name), colors[name], name)
            log_if_wide(axis, np.concatenate([column(records, key, name) for name in names]))
            axis.set(title=title, xlabel="step")
            axis.legend(fontsize=8)
        return to_svg(figures)


def distributions_plot(evals: Records) -> str | None:
    """Entropy of both models, and the overlap of their likeliest tokens, on the held-out answers."""
    records = [record for record in evals if record.get("student_entropy") is not None]
    if not records:
        return None
    overlap = column(records, "top_overlap")
    with matplotlib.rc_context(STYLE):
        figures, axes = make_axes(1 if np.isnan(overlap).all() else 2)
        line(axes[0], records, column(records, "student_entropy"), BLUE, "student")
        if not np.isnan(column(records, "teacher_entropy")).all():
            line(axes[0], records, column(records, "teacher_entropy"), ORANGE, "teacher")
        axes[0].set(title="entropy, nats per token", xlabel="step")
        axes[0].legend()
        if len(axes) > 1:
            line(axes[1], records, overlap, GREEN)
            axes[1].set(title="top-16 tokens in common, share", xlabel="step")
        return to_svg(figures)


def curves_plot(evals: Records) -> str | None:
    """Mean cosine over the first and over the last k tokens, at the first and the last evaluation."""
    records = [record for record in evals if record.get("curves")]
    if not records:
        return None
    with matplotlib.rc_context(STYLE):
        figures, axes = make_axes(2)
        for axis, end in zip(axes, ("first", "last"), strict=True):
            for record, color in ((records[0], GRAY), (records[-1], BLUE))[-len(records) :]:
                curve = record["curves"]
                values = [np.nan if value is None else value for value in curve[end]]
                axis.plot(curve["k"], values, color=color, marker="o", label=f"step {record['step']}")
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.set(title=f"cosine over the {end} k tokens", xlabel="k")
            axis.legend()
        return to_svg(figures)
