"""The engine's experts: transformers has them in one tensor, the trainer sends them one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from oprd_megatron.errors import WeightSyncError
from oprd_megatron.rollout.file_views import as_in_files
from oprd_megatron.rollout.hf_engine import HFEngine
from tests.tiny_models import Family, tiny_hf_model


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "qwen3"])
def test_views_are_the_file(tmp_path: Path, family: Family) -> None:
    """Names, shapes and values are those that transformers saves, and none of them is a copy."""
    tiny_hf_model(family, tmp_path, tied=False)
    model, saved = AutoModelForCausalLM.from_pretrained(tmp_path), load_file(tmp_path / "model.safetensors")
    views = as_in_files(model)
    assert views.keys() == saved.keys()
    assert all(torch.equal(views[name], saved[name]) for name in saved)
    with torch.no_grad():
        for view in views.values():
            view.fill_(2.0)
    assert all((parameter == 2.0).all() for parameter in model.parameters())


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_the_engine_takes_experts_one_by_one(tmp_path: Path, family: Family) -> None:
    """What arrives expert by expert is what the engine computes with; one expert that is missing or misshapen is named."""
    model = tiny_hf_model(family, tmp_path, tied=True, std=0.1)
    tensors = load_file(tmp_path / "model.safetensors")
    engine = HFEngine(tmp_path, torch.float32, "cpu", batch_size=2)
    engine.update_weights(1, iter(tensors.items()))
    ids = list(range(4, 40))
    with torch.no_grad():
        expected = (
            model(torch.tensor([ids])).logits[0].log_softmax(-1)[:-1].gather(-1, torch.tensor(ids)[1:, None])[:, 0]
        )
    torch.testing.assert_close(engine.score([ids])[0], expected, rtol=0, atol=1e-5)

    expert = next(name for name in tensors if ".experts.2." in name)
    without: Iterator[tuple[str, torch.Tensor]] = ((name, t) for name, t in tensors.items() if name != expert)
    with pytest.raises(WeightSyncError, match=f"1 weights were not sent, the first is '{expert}'"):
        engine.update_weights(2, without)
    misshapen = ((name, t.T if name == expert else t) for name, t in tensors.items())
    with pytest.raises(WeightSyncError, match=expert):
        engine.update_weights(2, misshapen)
