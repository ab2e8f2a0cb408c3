"""What tests of several packages share: a tiny run, and the demo teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import tiny_hf_model
from tools.make_demo_teacher import make_demo_teacher


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """A tiny run (five-layer teacher, four-layer student, few prompts; seconds) as nested dicts, for a test to change."""
    for name, layers, seed in (("teacher", 5, 1), ("student", 4, 2)):
        tiny_hf_model("llama", tmp_path / name, num_layers=layers, seed=seed, std=0.1)
    for name, first in (("train", 0), ("held_out", 50)):
        lines = [json.dumps({"prompt": f"say {number}"}) for number in range(first, first + 12)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return {
        "run": {"dir": str(tmp_path / "run"), "steps": 3, "micro_batch_size": 2, "device": "cpu", "seed": 5},
        "teacher": {"path": str(tmp_path / "teacher"), "dtype": "fp32"},
        "student": {"path": str(tmp_path / "student"), "dtype": "fp32"},
        "rollout": {
            "prompts": {"path": str(tmp_path / "train.jsonl")},
            "prompts_per_step": 4,
            "responses_per_prompt": 2,
            "max_response_tokens": 8,
        },
        # Adam divides by sqrt(v) + eps: with the usual 1e-8, gradients that are nothing but rounding would move weights.
        "optimizer": {"lr": 1e-3, "warmup_fraction": 0.2, "eps": 1e-6},
        "eval": {"prompts": {"path": str(tmp_path / "held_out.jsonl")}, "max_response_tokens": 8, "every": 2},
        "logging": {"progress": False, "tensorboard": False},
    }


@pytest.fixture(scope="session")
def demo_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as tools/make_demo_teacher.py writes it (540 MB, 20 s), made once."""
    folder = tmp_path_factory.mktemp("demo") / "teacher"
    assert make_demo_teacher(folder)
    return folder
