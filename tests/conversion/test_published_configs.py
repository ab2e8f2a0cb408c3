"""What is read from config.json as it lies beside published weights: every key understood, the right fields."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import published_configs as published
import pytest
from conversion_models import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from checkpoints_conversion import Architecture, mappings_for, read_architecture
from checkpoints_conversion.architecture import LinearRope, LongRope


def architecture(folder: Path, config: dict[str, Any]) -> Architecture:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return read_architecture(folder)


CONFIGS = {
    name: config for name, config in vars(published).items() if isinstance(config, dict) and "model_type" in config
}


@pytest.mark.parametrize("name", CONFIGS)
def test_tables_are_what_transformers_builds(name: str, tmp_path: Path) -> None:
    """Every tensor of the published model, with its shape, from the config alone; the model is built without memory."""
    import torch

    arch = architecture(tmp_path, CONFIGS[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    expected = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    shapes: dict[str, tuple[int, ...]] = {}
    for row in mappings_for(arch).values():
        shapes.update(row.hf_shapes)
    assert shapes == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_a_rewritten_config_reads_alike(name: str, tmp_path: Path) -> None:
    """transformers 5 reads the published spelling and writes its own; both give the same architecture."""
    arch = architecture(tmp_path, CONFIGS[name])
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "rewritten")
    assert read_architecture(tmp_path / "rewritten") == arch


def test_mistral(tmp_path: Path) -> None:
    """The first release has windows, later ones none; Nemo's heads are narrower than its width would make them. Without the
    key there is a window too: 4096 is transformers' default."""
    first, third, nemo = (
        architecture(tmp_path / str(number), config)
        for number, config in enumerate((published.MISTRAL_7B_V01, published.MISTRAL_7B_V03, published.MISTRAL_NEMO))
    )
    assert first.attention_windows == (4096,) * 32 and first.rotary_base == 10000.0
    assert third.attention_windows == () and third.rotary_base == 1000000.0 and third.head_dim == 128
    assert nemo.head_dim == 128 != nemo.hidden_size // nemo.num_attention_heads
    silent = {key: value for key, value in published.MISTRAL_7B_V01.items() if key != "sliding_window"}
    assert architecture(tmp_path / "silent", silent).attention_windows == (4096,) * 32


def test_phi(tmp_path: Path) -> None:
    """Plain rope and a window; longrope from three spellings; three quarters of each head rotated; neither."""
    short = architecture(tmp_path / "4k", published.PHI3_MINI_4K)
    assert short.rope_scaling is None and short.attention_windows == (2047,) * 32 and short.head_dim == 96
    long = architecture(tmp_path / "128k", published.PHI3_MINI_128K)
    assert isinstance(long.rope_scaling, LongRope)
    assert long.rope_scaling.long_factors[:2] == (1.0, 2.3) and len(long.rope_scaling.short_factors) == 48
    assert long.rope_scaling.original_max_position_embeddings == 4096
    assert long.rope_scaling.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    for key, name in (("type", "su"), ("rope_type", "longrope")):
        other = copy.deepcopy(published.PHI3_MINI_128K)
        del other["rope_scaling"]["type"]
        other["rope_scaling"][key] = name
        assert architecture(tmp_path / name, other) == long
    mini = architecture(tmp_path / "mini", published.PHI4_MINI)
    assert (mini.rotary_fraction, mini.head_dim, mini.tie_word_embeddings) == (0.75, 128, True)
    large = architecture(tmp_path / "phi4", published.PHI4)
    assert (large.attention_windows, large.rope_scaling, large.rotary_base) == ((), None, 250000.0)


def test_a_longrope_may_say_its_factors(tmp_path: Path) -> None:
    """A given attention factor is taken; a given factor replaces the ratio of lengths; no stretching, no factor."""
    config = copy.deepcopy(published.PHI3_MINI_128K)

    def attention_factor(**rope: float) -> float:
        scaling = architecture(tmp_path, {**config, "rope_scaling": {**config["rope_scaling"], **rope}}).rope_scaling
        assert isinstance(scaling, LongRope)
        return scaling.attention_factor

    assert attention_factor(attention_factor=1.19) == 1.19
    assert attention_factor(factor=4096.0) == pytest.approx(math.sqrt(2))
    assert attention_factor(factor=0.5) == 1.0


def test_gemma(tmp_path: Path) -> None:
    """Pattern and list say the same of which layers have a window; two rotary bases; embeddings scaled by the width's root."""
    small, large = (
        architecture(tmp_path / str(number), config)
        for number, config in enumerate((published.GEMMA3_270M, published.GEMMA3_1B))
    )
    assert small.attention_windows == ((512,) * 5 + (None,)) * 3
    assert large.attention_windows == ((512,) * 5 + (None,)) * 4 + (512, 512)
    for arch in (small, large):
        assert (arch.rotary_base, arch.local_rotary_base, arch.attention_scale) == (1e6, 1e4, 1 / 16)
        assert arch.embedding_scale == math.sqrt(arch.hidden_size) and arch.tie_word_embeddings
        assert arch.qk_norm and arch.sandwich_norm and arch.zero_centred_norm and arch.activation == "gelu_tanh"
    stretched = {**published.GEMMA3_1B, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert architecture(tmp_path / "stretched", stretched).rope_scaling == LinearRope(8.0)


def test_linear_rope_of_the_llama_family(tmp_path: Path) -> None:
    """Older long Llamas say it beside rope_theta."""
    tiny_config("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    assert architecture(
        tmp_path, {**config, "rope_scaling": {"type": "linear", "factor": 4.0}}
    ).rope_scaling == LinearRope(4.0)
