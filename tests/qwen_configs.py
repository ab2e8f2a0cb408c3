"""config.json of real, large models, without their weights: enough to plan with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QWEN_72B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "num_hidden_layers": 80,
    "hidden_size": 8192, "intermediate_size": 29568, "num_attention_heads": 64, "num_key_value_heads": 8,
    "vocab_size": 152064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False,
}  # fmt: skip
"""Qwen2.5-72B-Instruct: 72.7 billion parameters."""

QWEN_7B = {
    **QWEN_72B, "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
    "num_key_value_heads": 4,
}  # fmt: skip
"""Qwen2.5-7B-Instruct: 7.6 billion parameters."""


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """A Hugging Face directory with nothing but config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
