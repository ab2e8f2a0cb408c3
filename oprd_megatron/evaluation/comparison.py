"""Before and after training, as plain text for the terminal. Input: two `eval` records of metrics.jsonl."""

from __future__ import annotations

import textwrap
from typing import Any

WIDTH = 100
_PER_ROW = 3
_HEADLINES = (
    ("KL(teacher || student), nats per token", "kl"),
    ("cross-entropy, nats per token", "cross_entropy"),
    ("cosine of hidden states, mean over layers", "cosine"),
)


def before_after_table(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Held-out KL, cross-entropy and cosine: before, after and change; then the cosine of every layer.

    Args:
        before: The first eval record.
        after: The last one; the same layers.
    """
    lines = [f"{'held-out, on the answers of the teacher':<44}{'before':>10}{'after':>10}{'change':>10}"]
    for label, key in _HEADLINES:
        old, new, change = _figures(before[key], after[key], digits=4)
        lines.append(f"{label:<44}{old:>10}{new:>10}{change:>10}")
    for name, first, last in _by_teacher(before, after):
        lines += ["", f"cosine per layer (student <- teacher{name}): before, after, change", *_layer_rows(first, last)]
    return "\n".join(lines)


def _by_teacher(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(what to add to "teacher", its two records) of each teacher; the records themselves in a run with one."""
    if "teachers" not in after:
        return [("", before, after)]
    return [(f" {name}", before["teachers"][name], record) for name, record in after["teachers"].items()]


def eval_table(record: dict[str, Any]) -> str:
    """One eval record: KL (if there is one), cross-entropy, mean cosine, and the cosine of every layer."""
    lines = [
        f"held-out, on {record['tokens']} tokens of the teacher's answers",
        *(f"{label:<44}{record[key]:>10.4f}" for label, key in _HEADLINES if record[key] is not None),
    ]
    for name, _, of_teacher in _by_teacher(record, record):
        layers = of_teacher["layers"]
        cells = [
            f"{student_layer:>3} <-{teacher_layer:>3}{cosine:>7.3f}"
            for student_layer, teacher_layer, cosine in zip(
                layers["student"], layers["teacher"], layers["cosine"], strict=True
            )
        ]
        num_rows = -(-len(cells) // _PER_ROW)
        lines += ["", f"cosine per layer (student <- teacher{name})"]
        lines += ["   ".join(cells[row::num_rows]) for row in range(num_rows)]
    return "\n".join(lines)


def sample_answers(before: dict[str, Any], after: dict[str, Any], limit: int = 3) -> str:
    """The first few held-out prompts with the student's answers before and after, and the teacher's.

    Args:
        before: The first eval record, with "samples".
        after: The last one, with the same prompts.
        limit: Prompts shown.

    Returns:
        Text wrapped to 100 columns; empty where a record has no samples.
    """
    blocks = []
    for old, new in list(zip(before.get("samples", []), after.get("samples", []), strict=False))[:limit]:
        rows = (
            ("prompt", old["prompt"]),
            ("before", old["response"]),
            ("after", new["response"]),
            ("teacher", new["teacher"]),
        )
        blocks.append("\n".join(_wrapped(label, text) for label, text in rows))
    return "\n\n".join(blocks)


def _figures(old: float | None, new: float | None, digits: int) -> tuple[str, str, str]:
    """Before, after and change as text; a dash for what was not finite (null in metrics.jsonl)."""
    if old is None or new is None:
        return tuple("-" if value is None else f"{value:.{digits}f}" for value in (old, new, None))  # type: ignore
    return f"{old:.{digits}f}", f"{new:.{digits}f}", f"{new - old:+.{digits}f}"


def _layer_rows(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Layers go down the columns, so that neighbours in depth stand under each other."""
    layers = after["layers"]
    cells = []
    for student_layer, teacher_layer, old, new in zip(
        layers["student"], layers["teacher"], before["layers"]["cosine"], layers["cosine"], strict=True
    ):
        figures = "".join(f"{text:>7}" for text in _figures(old, new, digits=3))
        cells.append(f"{student_layer:>3} <-{teacher_layer:>3}{figures}")
    num_rows = -(-len(cells) // _PER_ROW)
    return ["   ".join(cells[row::num_rows]) for row in range(num_rows)]


def _wrapped(label: str, text: str) -> str:
    """One labelled text; what a terminal would act on (escape codes, carriage returns) is made visible."""
    lines = []
    for line in text.strip().split("\n"):
        shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line.expandtabs(4))
        lines += textwrap.wrap(shown, WIDTH - 9, drop_whitespace=True) or [""]
    return "\n".join(f"{label if index == 0 else '':<9}{line}".rstrip() for index, line in enumerate(lines))
