"""Which checkpoints of a run stay, and which is the best.

Each checkpoint has a figures.json with the latest figures measured at its step or before, and where they were measured:

    {"eval/kl": {"step": 40, "value": 0.31}, ..}

The best is decided from these files alone, so a resumed run, and one whose metrics are lost, decides alike. Of checkpoints that
share one measurement the first is the best: it is the one that was measured.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oprd_megatron.config.checkpoint import BestConfig
from oprd_megatron.errors import CheckpointError

FIGURES = "figures.json"
INCOMPLETE, DROPPED = ".incomplete", ".dropped"
"""Endings of directories that are being written, and that are being removed."""

Figures = dict[str, dict[str, float]]
"""{name: {"step": where it was measured, "value": ..}}."""


def figures_of(record: Mapping[str, Any]) -> Figures:
    """The finite figures of an eval or benchmark record, named eval/kl, eval/teachers/NAME/kl, benchmark/NAME/accuracy."""
    body = record["benchmarks"] if record["kind"] == "benchmark" else record
    found = _flat(
        record["kind"], {key: value for key, value in body.items() if key not in ("step", "layers", "curves")}
    )
    return {name: {"step": record["step"], "value": value} for name, value in found.items()}


def _flat(prefix: str, values: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(f"{prefix}/{key}", value)
        elif isinstance(value, (int, float)) and math.isfinite(value):
            found[f"{prefix}/{key}"] = float(value)
    return found


def read_figures(checkpoint: Path) -> Figures:
    """What a checkpoint was measured to be; nothing if it has no such file.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = checkpoint / FIGURES
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except ValueError:
        raise CheckpointError(f"{path}: not readable; delete it, and the checkpoint counts as not measured") from None


def complete_checkpoints(folder: Path) -> list[Path]:
    """All complete ones in a run's folder of checkpoints, oldest first."""
    found = [path for path in folder.glob("iter_*") if re.fullmatch(r"iter_\d{7,}", path.name)]
    return sorted((path for path in found if (path / "metadata.json").is_file()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("iter_"))


def ranked(folder: Path, best: BestConfig) -> list[Path]:
    """The checkpoints that have the figure, best first."""
    sign = 1 if best.mode == "min" else -1
    values = {path: read_figures(path).get(best.measure) for path in complete_checkpoints(folder)}
    measured = {path: sign * figure["value"] for path, figure in values.items() if figure is not None}
    return sorted(measured, key=lambda path: (measured[path], step_of(path)))


def drop_others(folder: Path, newest: Path, keep: int | None, best: BestConfig | None) -> None:
    """Remove what neither `keep` nor `best` keeps, and what saves or removals before left half done. Checkpoints of later steps
    than `newest`, of a run that was set back, are left to be replaced."""
    for pattern in (f"iter_*{INCOMPLETE}", f"iter_*{DROPPED}"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)
    if keep is None:
        return
    there = [path for path in complete_checkpoints(folder) if step_of(path) <= step_of(newest)]
    kept = {*there[-keep:], *(ranked(folder, best)[: best.count] if best else [])}
    for path in there:
        if path not in kept:
            remove(path)


def remove(checkpoint: Path) -> None:
    """A removal that is interrupted leaves nothing that looks like a checkpoint."""
    dropped = checkpoint.with_name(checkpoint.name + DROPPED)
    checkpoint.rename(dropped)
    shutil.rmtree(dropped)
