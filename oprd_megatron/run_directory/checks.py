"""A run's directory, before the run: can it be written, is there room, does it hold this run or another one?"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

from checkpoints_conversion import Architecture, mappings_for
from oprd_megatron.config import RunConfig, load_config
from oprd_megatron.errors import CheckpointError, ConfigError, UserError
from oprd_megatron.run_directory.files import CONFIG_FILE
from oprd_megatron.saving.checkpoint import latest_checkpoint

BYTES_ON_DISK_PER_PARAMETER = 16

IDENTITY = ("run.seed", "teacher.path", "teacher.ema_decay", "student.path", "rollout.prompts", "distill", "output")
"""What makes two configs the same run."""


def check_run_dir(config: RunConfig) -> Path | None:
    """The checkpoint to resume from; also refuses a run directory that cannot be written."""
    folder = config.run.dir
    check_writable(folder, "run.dir")
    _refuse_another_run(config)
    newest = latest_checkpoint(folder)
    if newest is not None and config.checkpoint.resume == "never":
        raise CheckpointError(
            f"run.dir: {folder} already holds {newest.name}; set checkpoint.resume: auto to continue, or use another run.dir"
        )
    return newest


def check_writable(folder: Path, key: str) -> None:
    """`folder` can be written, or made.

    Args:
        folder: where results will go.
        key: of the config or the command line, for the message.

    Raises:
        UserError: it cannot.
    """
    existing = _existing_parent(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{key}: {existing} is not a directory that can be written; choose another {key}")


def check_disk(config: RunConfig, student: Architecture) -> None:
    """Room for one checkpoint and the export: weights, fp32 master weights and two Adam moments make 16 bytes a parameter,
    in fp32 (4 + 8 + 4) as in bf16 (2 + 4 + 8 + 2)."""
    parameters = sum(
        math.prod(shape)
        for mapping in mappings_for(student).values()
        for shape in (mapping.hf_shapes.values() if mapping.exported else ())
    )
    needed = BYTES_ON_DISK_PER_PARAMETER * parameters
    free = shutil.disk_usage(_existing_parent(config.run.dir)).free
    if free < needed:
        raise UserError(
            f"run.dir: {config.run.dir} has {free / 1e9:.1f} GB free, but a checkpoint and the exported student need "
            f"{needed / 1e9:.1f} GB; free some space or choose another run.dir"
        )


def _existing_parent(folder: Path) -> Path:
    """The folder itself, or the nearest folder above it that exists."""
    return next(parent for parent in (folder, *folder.parents, Path(".")) if parent.exists())


def _refuse_another_run(config: RunConfig) -> None:
    """A run directory belongs to one run: its models, data, loss and seed may not change. Layouts, the number of steps and
    what is logged may."""
    path = config.run.dir / CONFIG_FILE
    if not path.exists():
        return
    before = load_config(path)
    found = [
        {**{key: _lookup(values.model_dump(), key) for key in IDENTITY}, **_of_several_teachers(values)}
        for values in (before, config)
    ]
    for key, new in found[1].items():
        old = found[0][key]
        if old != new:
            raise ConfigError(
                f"run.dir: {config.run.dir} holds a run with another {key} ({old}, now {new}); use another run.dir"
            )


def _lookup(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def _of_several_teachers(config: RunConfig) -> dict[str, Any]:
    """What of several teachers makes two configs the same run."""
    teaching = config.teaching.model_dump(exclude={"host_budget"}) if config.teaching else None
    return {
        "teachers": {teacher.name: str(teacher.path) for teacher in config.teachers},
        "teachers' weights": {teacher.name: teacher.weight for teacher in config.teachers},
        "teachers' distill": {teacher.name: teacher.distill.model_dump(mode="json") for teacher in config.teachers},
        "teaching": teaching,
    }
