"""Settings and directories as Megatron-LM and Megatron-Bridge keep them. Neither is installed here: what is foreign is built
from its documented layout, and what mcore reads is read by mcore."""

from __future__ import annotations

import argparse
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from megatron.core import dist_checkpointing
from megatron.core.transformer.transformer_config import TransformerConfig

from checkpoints_conversion import Architecture
from checkpoints_conversion.architecture import Experts, LinearRope, Llama3Rope, LongRope
from checkpoints_conversion.interop import (
    RUN_CONFIG,
    check_same_model,
    common_state,
    megatron_args,
    notes_for,
    read_run_config,
    run_config_yaml,
)
from checkpoints_conversion.torch_dist import read_common, write_common
from oprd_megatron.errors import CheckpointError

PLAIN = Architecture(
    family="qwen3",
    num_layers=12,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=32,
    vocab_size=509,
    max_position_embeddings=256,
    norm_epsilon=1e-6,
    rotary_base=1e6,
    rope_scaling=None,
    tie_word_embeddings=False,
    qkv_bias=False,
    qk_norm=True,
)
GEMMA = replace(
    PLAIN,
    family="gemma3_text",
    tie_word_embeddings=True,
    rope_scaling=LinearRope(8.0),
    local_rotary_base=10000.0,
    attention_windows=((16,) * 5 + (None,)) * 2,
    attention_scale=0.1,
    activation="gelu_tanh",
    zero_centred_norm=True,
    sandwich_norm=True,
    embedding_scale=8.0,
)
ARCHITECTURES = {
    "plain": PLAIN,
    "tied with biases": replace(PLAIN, tie_word_embeddings=True, qkv_bias=True, qk_norm=False, num_query_groups=4),
    "llama3": replace(PLAIN, rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 8192)),
    "other llama3": replace(PLAIN, rope_scaling=Llama3Rope(32.0, 2.0, 4.0, 4096)),
    "linear rope": replace(PLAIN, rope_scaling=LinearRope(4.0)),
    "longrope": replace(PLAIN, rotary_fraction=0.75, rope_scaling=LongRope((1.0,) * 12, (2.0,) * 12, 128, 1.1)),
    "window": replace(PLAIN, attention_windows=(32,) * 12),
    "some windows": replace(PLAIN, attention_windows=(32, None, None) * 4),
    "experts": replace(PLAIN, experts=Experts(8, 2, ffn_hidden_size=128, normalised=True)),
    "other experts": replace(PLAIN, experts=Experts(8, 2, ffn_hidden_size=128, normalised=False)),
    "gemma": GEMMA,
}
BRIDGE_ONLY = {
    *("_target_", "autocast_dtype", "make_vocab_size_divisible_by", "position_embedding_type", "rope_scaling"),
    *("rope_scaling_factor", "rotary_base", "rotary_percent", "seq_len_interpolation_factor", "seq_length"),
    *("share_embeddings_and_output_weights", "should_pad_vocab", "vocab_size", "interleaved_attn_pattern"),
}
"""Fields of Bridge's providers that mcore's TransformerConfig has not (gpt_provider.py and gemma3_provider.py, 0.3.1)."""
USE_CHECKPOINT_ARGS = """
    num_layers hidden_size ffn_hidden_size seq_length num_attention_heads num_query_groups
    group_query_attention kv_channels max_position_embeddings position_embedding_type add_position_embedding
    use_rotary_position_embeddings rotary_base rotary_percent rotary_interleaved add_bias_linear add_qkv_bias squared_relu
    swiglu untie_embeddings_and_output_weights apply_layernorm_1p normalization apply_query_key_layer_scaling
    attention_dropout hidden_dropout num_experts moe_layer_freq moe_ffn_hidden_size moe_router_topk moe_router_pre_softmax
    moe_router_score_function tokenizer_type padded_vocab_size ckpt_format tensor_model_parallel_size
    pipeline_model_parallel_size expert_model_parallel_size"""
"""What Megatron-LM's load_args_from_checkpoint takes (checkpointing.py), less what is only about training."""


def stored(arch: Architecture, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What we write for a model, written and read again: common.pt and run_config.yaml."""
    common, _ = common_state(arch, "BF16", tp=2, padded_vocab_size=512)
    write_common(folder, common)
    (folder / RUN_CONFIG).write_text(run_config_yaml(arch, "BF16", 2, 1, 1))
    run_config = read_run_config(folder)
    assert run_config is not None
    return read_common(folder), run_config


def foreign(**changes: Any) -> dict[str, Any]:
    """common.pt of a model that Megatron-LM trained, with some arguments changed or (by `...`) missing."""
    args = megatron_args(PLAIN, "BF16", padded_vocab_size=512) | changes
    given = {name: value for name, value in args.items() if value is not ...}
    return {"args": argparse.Namespace(**given), "checkpoint_version": 3.0, "iteration": 5}


def bridge(arch: Architecture = PLAIN, **changes: Any) -> dict[str, Any]:
    """run_config.yaml of a model that Megatron-Bridge trained, with settings changed."""
    config = yaml.safe_load(run_config_yaml(arch, "BF16", 1, 1, 1))
    config["model"] |= changes
    return config


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_we_write_is_read_as_the_same_model(kind: str, tmp_path: Path) -> None:
    """Both files agree with the config.json they came from, and a converted directory raises no doubts."""
    common, run_config = stored(ARCHITECTURES[kind], tmp_path)
    assert check_same_model(ARCHITECTURES[kind], common, run_config, tmp_path) == []
    assert check_same_model(ARCHITECTURES[kind], common, None, tmp_path) == []


@pytest.mark.parametrize("other", ARCHITECTURES)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_each_model_is_told_from_each_other(kind: str, other: str, tmp_path: Path) -> None:
    """Models of equal shapes that compute other things are told apart by either file alone. (Longrope has no name in
    either: here it is told by the part of a head that is rotated.)"""
    if kind == other:
        return
    common, run_config = stored(ARCHITECTURES[other], tmp_path)
    with pytest.raises(CheckpointError):
        check_same_model(ARCHITECTURES[kind], common, None, tmp_path)
    with pytest.raises(CheckpointError):
        check_same_model(ARCHITECTURES[kind], {}, run_config, tmp_path)


def test_args_have_what_use_checkpoint_args_reads() -> None:
    """No field that Megatron-LM takes from a checkpoint is left to the defaults of a command line."""
    args = megatron_args(ARCHITECTURES["experts"], "BF16", padded_vocab_size=512)
    assert [name for name in USE_CHECKPOINT_ARGS.split() if args.get(name) is None] == []


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_run_config_names_fields_that_exist(kind: str) -> None:
    """Every key of `model` is a field of mcore's TransformerConfig or known of Bridge's provider: Bridge drops others with a
    warning, and computes something else."""
    known = {field.name for field in fields(TransformerConfig)} | BRIDGE_ONLY
    assert set(bridge(ARCHITECTURES[kind])["model"]) <= known


def test_run_config_has_what_bridge_reads_without_asking() -> None:
    """Keys that Bridge's load_checkpoint indexes, and would fail without."""
    config = bridge()
    assert {"tensor_model_parallel_size", "pipeline_model_parallel_size"} <= config["model"].keys()
    assert {"save_optim", "save_rng", "fully_parallel_save"} <= config["checkpoint"].keys()
    assert config["tokenizer"]["_target_"].endswith("TokenizerConfig")


def test_mcore_reads_our_common_state(tmp_path: Path) -> None:
    """mcore loads common.pt with torch's safe unpickler: arguments, dtype and content metadata come back."""
    common, _ = common_state(PLAIN, "BF16", padded_vocab_size=512)
    write_common(tmp_path, common)
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    loaded = dist_checkpointing.load_common_state_dict(str(tmp_path))
    assert loaded["args"].params_dtype is torch.bfloat16 and loaded["args"].norm_epsilon == 1e-6
    assert (loaded["checkpoint_version"], loaded["iteration"]) == (3.0, 0)
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=loaded)
    assert metadata == {"singleton_local_shards": False, "non_homogeneous_layers": False}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"num_layers": 13}, "num_layers"),
        ({"hidden_size": 128}, "hidden_size"),
        ({"ffn_hidden_size": 256}, "ffn_hidden_size"),
        ({"num_attention_heads": 8}, "num_attention_heads"),
        ({"num_query_groups": 4}, "num_query_groups"),
        ({"group_query_attention": False}, "group_query_attention"),
        ({"kv_channels": 16}, "kv_channels"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type"),
        ({"rotary_base": 10000}, "rotary_base"),
        ({"rotary_percent": 0.5}, "rotary_percent"),
        ({"rotary_interleaved": True}, "rotary_interleaved"),
        ({"rotary_seq_len_interpolation_factor": 4}, "rotary_seq_len_interpolation_factor"),
        ({"use_rope_scaling": True}, "rope_scaling_factor"),
        ({"normalization": "LayerNorm"}, "normalization"),
        ({"norm_epsilon": 1e-5}, "norm_epsilon"),
        ({"apply_layernorm_1p": True}, "apply_layernorm_1p"),
        ({"swiglu": False}, "swiglu"),
        ({"squared_relu": True}, "squared_relu"),
        ({"untie_embeddings_and_output_weights": False}, "untie_embeddings_and_output_weights"),
        ({"add_bias_linear": True}, "add_bias_linear"),
        ({"add_qkv_bias": True}, "add_qkv_bias"),
        ({"qk_layernorm": False}, "qk_layernorm"),
        ({"softmax_scale": 1.0}, "softmax_scale"),
        ({"multi_latent_attention": True}, "multi_latent_attention"),
        ({"window_size": (31, 0)}, "window_size"),
        ({"num_experts": 8}, "num_experts"),
    ],
)
def test_every_argument_that_changes_the_maths_is_compared(changes: dict[str, Any], name: str, tmp_path: Path) -> None:
    """One different argument is refused in one line that names it and both values."""
    with pytest.raises(CheckpointError, match=rf"args\.{name} is .*, but config.json says") as caught:
        check_same_model(PLAIN, foreign(**changes), None, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("plain", {"layernorm_epsilon": "1e-05"}),
        ("plain", {"rotary_base": 10000}),
        ("plain", {"share_embeddings_and_output_weights": True}),
        ("plain", {"gated_linear_unit": False}),
        ("plain", {"activation_func": {"_target_": "torch.nn.functional.gelu", "_call_": False}}),
        ("plain", {"layernorm_zero_centered_gamma": True}),
        ("plain", {"num_moe_experts": 8}),
        ("plain", {"rope_scaling": True, "rope_scaling_factor": 8.0}),
        ("plain", {"seq_len_interpolation_factor": 2.0}),
        ("plain", {"_target_": "a.Llama31ModelProvider", "scale_factor": 8.0}),
        ("other llama3", {"_target_": "a.Llama31ModelProvider", "scale_factor": 32.0, "low_freq_factor": 1.0}),
        ("llama3", {"rope_scaling_factor": 32.0}),
        ("window", {"window_size": [30, 0]}),
        ("window", {"window_attn_skip_freq": 2}),
        ("some windows", {"window_size": [31, 0], "window_attn_skip_freq": None}),
        ("experts", {"moe_router_topk": 4}),
        ("experts", {"moe_router_pre_softmax": True}),
        ("experts", {"moe_router_score_function": "sigmoid"}),
        ("experts", {"moe_ffn_hidden_size": 64}),
        ("experts", {"moe_router_topk_scaling_factor": 2.5}),
        ("experts", {"moe_shared_expert_intermediate_size": 64}),
        ("experts", {"moe_layer_freq": [0] + [1] * 11}),
        ("gemma", {"rotary_base": [20000, 1000000]}),
        ("gemma", {"rotary_base": [10000, 20000]}),
        ("gemma", {"rope_scaling_factor": 1.0}),
        ("gemma", {"window_size": 31}),
        ("gemma", {"interleaved_attn_pattern": [3, 1]}),
        ("gemma", {"softmax_scale": None}),
    ],
)
def test_every_setting_of_bridge_that_changes_the_maths_is_compared(
    arch: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """The same for run_config.yaml, whose names are mcore's."""
    run_config = bridge(ARCHITECTURES[arch])
    assert check_same_model(ARCHITECTURES[arch], {"converted_by": "oprd-megatron"}, run_config, tmp_path) == []
    with pytest.raises(CheckpointError, match=r"run_config.yaml: model\..* is .*, but config.json says"):
        check_same_model(ARCHITECTURES[arch], {}, bridge(ARCHITECTURES[arch], **changes), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"bf16": False, "params_dtype": "F32", "tensor_model_parallel_size": 8, "tokenizer_model": "/else/where"},
        {"attention_dropout": 0.1, "seq_length": 128, "padded_vocab_size": 1024, "make_vocab_size_divisible_by": 1},
        {"rotary_base": 1000000, "norm_epsilon": 1.0000000001e-06},
        {"qk_layernorm": ..., "window_size": ..., "softmax_scale": ..., "swiglu": ..., "use_rope_scaling": ...},
        {"rotary_interleaved": None, "multi_latent_attention": None, "moe_layer_freq": 1, "moe_router_topk": 2},
    ],
)
def test_what_cannot_change_the_maths_is_not_compared(changes: dict[str, Any], tmp_path: Path) -> None:
    """Layout, dtype, paths, dropout and training; old arguments that lack a name; and experts of a model without."""
    assert check_same_model(PLAIN, foreign(**changes), None, tmp_path) == []


def test_bridges_windows_count_one_position_more(tmp_path: Path) -> None:
    """Bridge 0.3.1 hands Hugging Face's `sliding_window` to mcore as the number of keys before the query; that is its Mistral,
    not another model. We write the number that makes mcore compute what Hugging Face does."""
    arch = ARCHITECTURES["window"]
    assert bridge(arch)["model"]["window_size"] == [31, 0] and bridge(GEMMA)["model"]["window_size"] == 15
    assert check_same_model(arch, {}, bridge(arch, window_size=[32, 0]), tmp_path) == []


def test_a_checkpoint_without_settings_says_so(tmp_path: Path) -> None:
    """Nothing to compare is a note, not silence."""
    (note,) = check_same_model(PLAIN, {"iteration": 3}, None, tmp_path)
    assert "stores no settings" in note


def test_a_foreign_checkpoint_of_what_its_package_cannot_compute_raises_doubts(tmp_path: Path) -> None:
    """Megatron-LM cannot have trained with other llama3 constants than its own, so config.json is suspect; that is noted."""
    arch = ARCHITECTURES["other llama3"]
    args = megatron_args(arch, "BF16", padded_vocab_size=512)
    notes = check_same_model(arch, {"args": argparse.Namespace(**args)}, None, tmp_path)
    assert any("llama3 rope with (2.0, 4.0, 4096)" in note for note in notes)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("plain", []),
        ("llama3", []),
        ("other llama3", ["Megatron-LM", "Megatron-LM", "Megatron-Bridge"]),
        ("linear rope", ["Megatron-LM"]),
        ("longrope", ["Megatron-LM", "Megatron-Bridge"]),
        ("some windows", []),
        ("gemma", ["Megatron-LM"] * 5),
    ],
)
def test_what_a_package_cannot_say_is_said(kind: str, expected: list[str]) -> None:
    """Each feature that a package would silently compute otherwise has a line of its own."""
    would = [note for note in notes_for(ARCHITECTURES[kind], "BF16") if "would compute something else" in note]
    assert [note.split(" would ")[0] for note in would] == expected
    assert all("\n" not in note for note in would)


def test_the_flags_that_megatron_lm_must_be_given_again() -> None:
    """What --use-checkpoint-args leaves out is spelled out as it is typed."""
    flags = notes_for(replace(ARCHITECTURES["some windows"], rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 8192)), "BF16")[0]
    for flag in ("--norm-epsilon 1e-06 ", "--bf16 ", "--qk-layernorm ", "--use-rope-scaling ", "--window-size 31,0 "):
        assert flag in flags
    assert '--window-attn-skip-freq "[1, 0, 0,' in flags


@pytest.mark.parametrize("value", [math.nan, "x" * 9999, {"a": 1}, [1] * 9999, b"\x1b[2J", -1, 10**400, None])
def test_any_value_of_any_setting_is_compared_or_refused(value: Any, tmp_path: Path) -> None:
    """A stranger's settings end in a verdict, never in another exception, and a message stays short and printable."""
    arch = ARCHITECTURES["gemma"]
    for name in {**megatron_args(ARCHITECTURES["experts"], "BF16", padded_vocab_size=512), **bridge(arch)["model"]}:
        for common, run_config in (
            (foreign(**{"window_size": (31, 0), name: value}), None),
            ({}, bridge(arch, **{name: value})),
        ):
            try:
                check_same_model(arch if run_config else PLAIN, common, run_config, tmp_path)
            except CheckpointError as error:
                assert len(str(error)) < 600 and str(error).isprintable()
