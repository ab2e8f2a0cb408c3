"""Run a config on gloo ranks of this machine."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from oprd_megatron.config import parse_config
from oprd_megatron.logging import read_records
from tests.ranks import run_ranks


def changed(values: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """A copy with some keys of some sections set: `changed(values, run={"steps": 2})`."""
    copied = copy.deepcopy(values)
    for section, keys in sections.items():
        copied[section].update(keys)
    return copied


def with_layout(values: dict[str, Any], **parallel: Any) -> dict[str, Any]:
    """A copy with the same parallel layout for both models."""
    return changed(values, teacher={"parallel": parallel}, student={"parallel": parallel})


def train_on_rank(values: dict[str, Any]) -> None:
    from oprd_megatron.loop import train

    train(parse_config(values, "test"))


def train_run(values: dict[str, Any]) -> Path:
    """Train to the end (or `stop_at`) on as many ranks as the student's layout has. Returns the run directory."""
    parallel = values["student"].get("parallel", {})
    world = parallel.get("tp", 1) * parallel.get("pp", 1) * parallel.get("dp", 1)
    run_ranks(world, train_on_rank, values)
    return Path(values["run"]["dir"])


def student_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """The exported student of a finished run."""
    return load_file(os.fspath(run_dir / "student_hf" / "model.safetensors"))


def train_records(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Records of one kind from the run's metrics."""
    return [record for record in read_records(run_dir / "metrics.jsonl") if record["kind"] == kind]
