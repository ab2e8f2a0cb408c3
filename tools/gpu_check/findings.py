"""What a check found, and the table of all of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["pass", "FAIL", "skip"]
COLUMNS = ("stage", "check", "verdict", "figure", "bar")


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        check: what was looked at.
        verdict: skip says that nothing was looked at; the figure then says why.
        figure: what was found.
        bar: what was asked for, empty for a figure that is only told.
    """

    check: str
    verdict: Verdict
    figure: str = ""
    bar: str = ""


def at_most(check: str, value: float, bar: float, note: str = "") -> Finding:
    """A figure that passes if it is no larger than the bar; NaN fails."""
    return Finding(check, "pass" if value <= bar else "FAIL", _with(value, note), f"<= {bar:g}")


def at_least(check: str, value: float, bar: float, note: str = "") -> Finding:
    """A figure that passes if it is no smaller than the bar; NaN fails."""
    return Finding(check, "pass" if value >= bar else "FAIL", _with(value, note), f">= {bar:g}")


def _with(value: float, note: str) -> str:
    return f"{value:.3g} {note}".rstrip()


def write_finding(path: Path, finding: Finding) -> None:
    """Append a finding to a stage's file, at once: the stage may be cut before it ends."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(finding)) + "\n")


def read_findings(path: Path) -> list[Finding]:
    """Findings of a stage, as far as it got; a line that was cut short is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [Finding(**json.loads(line)) for line in lines]


def table(rows: Iterable[tuple[str, Finding]]) -> str:
    """(stage, finding) as lines of ` | `-separated columns, padded to the same width; bars in figures are replaced."""
    cells = [COLUMNS, *((stage, f.check, f.verdict, f.figure, f.bar) for stage, f in rows)]
    clean = [[cell.replace("|", "/").replace("\n", " ") for cell in row] for row in cells]
    widths = [max(len(row[column]) for row in clean) for column in range(len(COLUMNS))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in clean]
    return "\n".join([lines[0], "-+-".join("-" * width for width in widths), *lines[1:]])


def as_json(stages: dict[str, tuple[float, list[Finding]]]) -> dict[str, Any]:
    """{stage: (seconds, findings)} for results.json."""
    return {
        stage: {"seconds": round(seconds, 1), "findings": [asdict(finding) for finding in findings]}
        for stage, (seconds, findings) in stages.items()
    }
