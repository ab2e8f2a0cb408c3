"""config.json of real, large models, without their weights: enough to plan with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODEL_CONFIGS = Path(__file__).parents[1] / "examples" / "model_configs"


def published(name: str) -> dict[str, Any]:
    """The published config.json of a model."""
    return json.loads((MODEL_CONFIGS / name / "config.json").read_text())


QWEN_72B = published("Qwen2.5-72B-Instruct")
"""72.7 billion parameters."""

QWEN_7B = published("Qwen2.5-7B")
"""7.6 billion parameters."""


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """A Hugging Face directory with nothing but config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
