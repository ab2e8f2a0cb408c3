"""Llama 3 frequency scaling: mcore applies it as transformers does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.models.test_parity import LAYOUTS, assert_parity, ragged_texts, reference
from tests.tiny_models import randomise, tiny_config, tiny_tokenizer

VOCAB, LENGTH = 260, 400
TOLERANCE = 1e-5


def make_model(out_dir: Path, rope: dict[str, object]) -> LlamaConfig:
    """Head width 16 and base 500,000: wavelengths from 6 to 610,000 tokens, on both sides of either scaling's limits."""
    config = tiny_config("llama", num_layers=2, hidden_size=64, vocab_size=VOCAB)
    config.max_position_embeddings = 16384
    config.rope_parameters = {"rope_theta": 500000.0, **rope}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, seed=4, std=0.1)
    model.save_pretrained(out_dir)
    tiny_tokenizer(out_dir)
    return config


@pytest.mark.parametrize("layout", ["single", "tp2", "pp2", "cp2"])
@pytest.mark.parametrize("original", [8192, 64])
def test_llama3_scaling_equals_transformers(tmp_path: Path, layout: str, original: int) -> None:
    """Hidden states and logits over 400 positions equal transformers'; without the scaling they would not."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_type": "llama3", **scaling, "original_max_position_embeddings": original}
    make_model(tmp_path / "scaled", rope)
    make_model(tmp_path / "plain", {"rope_type": "default"})
    texts = ragged_texts([LENGTH, 3], VOCAB)
    scaled, plain = (reference(tmp_path / name, texts)[1] for name in ("scaled", "plain"))
    assert (scaled - plain).abs().max() > 100 * TOLERANCE * scaled.abs().max()
    assert_parity(tmp_path / "scaled", LAYOUTS[layout], texts, pad_heads=False, vocab=VOCAB, tolerance=TOLERANCE)
