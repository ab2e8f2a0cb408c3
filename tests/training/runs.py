"""Run a config on gloo ranks of this machine."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from oprd_megatron.config import parse_config
from oprd_megatron.logging import read_records
from tests.ranks import run_ranks
from tests.tiny_models import Family, tiny_hf_model


def tiny_run(folder: Path, family: Family = "llama") -> dict[str, Any]:
    """A run of a five-layer teacher and a four-layer student on few prompts, all written to `folder`; takes seconds."""
    for name, layers, seed in (("teacher", 5, 1), ("student", 4, 2)):
        tiny_hf_model(family, folder / name, num_layers=layers, seed=seed, std=0.1)
    for name, first in (("train", 0), ("held_out", 50)):
        lines = [json.dumps({"prompt": f"say {number}"}) for number in range(first, first + 12)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tiny_values(folder)


def tiny_values(folder: Path) -> dict[str, Any]:
    """`tiny_run` where models and files are there."""
    return {
        "run": {"dir": str(folder / "run"), "steps": 3, "micro_batch_size": 2, "device": "cpu", "seed": 5},
        "teacher": {"path": str(folder / "teacher"), "dtype": "fp32"},
        "student": {"path": str(folder / "student"), "dtype": "fp32"},
        "rollout": {
            "prompts": {"path": str(folder / "train.jsonl")},
            "prompts_per_step": 4,
            "responses_per_prompt": 2,
            "max_response_tokens": 8,
        },
        # Adam divides by sqrt(v) + eps: with the usual 1e-8, gradients that are nothing but rounding would move weights.
        "optimizer": {"lr": 1e-3, "warmup_fraction": 0.2, "eps": 1e-6},
        "eval": {"prompts": {"path": str(folder / "held_out.jsonl")}, "max_response_tokens": 8, "every": 2},
        "logging": {"progress": False, "tensorboard": False},
    }


def changed(values: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """A copy with some keys of some sections set: `changed(values, run={"steps": 2})`."""
    copied = copy.deepcopy(values)
    for section, keys in sections.items():
        copied[section].update(keys)
    return copied


def with_layout(
    values: dict[str, Any],
    teacher: dict[str, Any] | None = None,
    student: dict[str, Any] | None = None,
    **parallel: Any,
) -> dict[str, Any]:
    """A copy with the same parallel layout for both models, or one for each."""
    return changed(values, teacher={"parallel": teacher or parallel}, student={"parallel": student or parallel})


def num_ranks(values: dict[str, Any]) -> int:
    """Ranks that the models' layouts need: up to the last one that they name, else the product of their sizes."""

    def end(parallel: dict[str, Any]) -> int:
        if "ranks" in parallel:
            return int(parallel["ranks"].split("-")[1]) + 1
        return math.prod(parallel.get(axis, 1) for axis in ("tp", "cp", "pp", "dp"))

    return max(end(values[model].get("parallel", {})) for model in ("teacher", "student"))


def train_on_rank(values: dict[str, Any]) -> None:
    from oprd_megatron.loop import train

    train(parse_config(values, "test"))


def train_run(values: dict[str, Any]) -> Path:
    """Train to the end (or `stop_at`) on as many ranks as the layouts have. Returns the run directory."""
    run_ranks(num_ranks(values), train_on_rank, values)
    return Path(values["run"]["dir"])


def student_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """The exported student of a finished run."""
    return load_file(os.fspath(run_dir / "student_hf" / "model.safetensors"))


def train_records(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Records of one kind from the run's metrics."""
    return [record for record in read_records(run_dir / "metrics.jsonl") if record["kind"] == kind]
