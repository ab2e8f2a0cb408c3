"""A model's settings, as Megatron-LM and Megatron-Bridge keep them in a checkpoint.

Megatron-LM stores its whole command line, a Namespace, under `args` in common.pt. With `--use-checkpoint-args` it takes the
model from there, but not all of it: the norms' epsilon, query/key norms, windows, rotary scaling and dtype must be on the
command line again, or their defaults hold without a word (1e-5 for the epsilon, where Qwen has 1e-6). `notes` spells out
the flags, and what neither package can say.

Megatron-Bridge stores run_config.yaml. Its `model` section is built by calling `_target_` with the other keys; an entry with
`_call_: false` is the object of that name itself.
"""

from __future__ import annotations

import argparse
from typing import Any

import yaml

from checkpoints_conversion.architecture import VOCAB_MULTIPLE, Architecture, LinearRope, Llama3Rope
from checkpoints_conversion.files.dtypes import TORCH_NAMES
from checkpoints_conversion.interop.notes import notes_for
from checkpoints_conversion.interop.windows import full_attention_period, window_settings

RUN_CONFIG = "run_config.yaml"
TRACKER = "latest_checkpointed_iteration.txt"

CHECKPOINT_VERSION = 3.0
"""Of Megatron-LM's format: since 2.0, q, k and v are in the order that this project writes."""
CONVERTED_BY = "oprd-megatron"
"""Marks settings that this project wrote, of a converted model or a run; until Megatron-LM or Megatron-Bridge saves it."""
GPT_PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"
GEMMA3_PROVIDER = "megatron.bridge.models.gemma.gemma3_provider.Gemma3ModelProvider"


def megatron_args(
    arch: Architecture,
    dtype: str,
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    make_vocab_size_divisible_by: int = VOCAB_MULTIPLE,
    padded_vocab_size: int,
) -> dict[str, Any]:
    """The model as Megatron-LM's arguments, without `params_dtype`, which is a torch object.

    Choices about training (dispatcher, grouped GEMM, balancing losses) are left out, so that the command line's hold.

    Args:
        arch: the model.
        dtype: of the weights: F32, BF16 or F16.
        tp, pp, ep: layout to name; a torch_dist checkpoint loads into any.
        make_vocab_size_divisible_by: what the vocabulary was padded with.
        padded_vocab_size: rows of the stored embedding.
    """
    return {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "group_query_attention": arch.num_query_groups != arch.num_attention_heads,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.head_dim,
        "max_position_embeddings": arch.max_position_embeddings,
        "seq_length": arch.max_position_embeddings,
        **_rope_args(arch),
        "normalization": "RMSNorm",
        "norm_epsilon": arch.norm_epsilon,
        "apply_layernorm_1p": arch.zero_centred_norm,
        "swiglu": arch.activation == "silu",
        "squared_relu": False,
        "untie_embeddings_and_output_weights": not arch.tie_word_embeddings,
        "add_bias_linear": False,
        "add_qkv_bias": arch.qkv_bias,
        "qk_layernorm": arch.qk_norm,
        "apply_query_key_layer_scaling": False,
        "softmax_scale": arch.attention_scale,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "multi_latent_attention": False,
        **window_settings(arch),
        **_experts(arch, "num_experts"),
        "vocab_size": arch.vocab_size,
        "padded_vocab_size": padded_vocab_size,
        "make_vocab_size_divisible_by": make_vocab_size_divisible_by,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": None,
        "bf16": dtype == "BF16",
        "fp16": dtype == "F16",
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": None,
        "expert_model_parallel_size": ep,
        **_FRESH,
    }


_FRESH = {
    "ckpt_format": "torch_dist",
    "no_save_optim": True,
    "no_save_rng": True,
    "consumed_train_samples": 0,
    "skipped_train_samples": 0,
    "consumed_valid_samples": 0,
}
"""Of a checkpoint without training."""


def _rope_args(arch: Architecture) -> dict[str, Any]:
    rope = arch.rope_scaling
    return {
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": True,
        "rotary_base": _whole(arch.rotary_base),
        "rotary_percent": arch.rotary_fraction,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": _whole(rope.factor) if isinstance(rope, LinearRope) else None,
        "use_rope_scaling": isinstance(rope, Llama3Rope),
        "rope_scaling_factor": rope.factor if isinstance(rope, Llama3Rope) else 8.0,
    }


def common_state(
    arch: Architecture,
    dtype: str,
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    vocab_multiple: int = VOCAB_MULTIPLE,
    padded_vocab_size: int,
) -> tuple[dict[str, Any], list[str]]:
    """What goes into common.pt, and what a user should know about it. Arguments as for `megatron_args`; imports torch for
    `params_dtype`.

    A `release` directory needs no more: Megatron-LM starts at iteration 0, without optimizer and random states.
    """
    import torch

    args = megatron_args(
        arch,
        dtype,
        tp=tp,
        pp=pp,
        ep=ep,
        make_vocab_size_divisible_by=vocab_multiple,
        padded_vocab_size=padded_vocab_size,
    )
    state = {
        "args": argparse.Namespace(**args, params_dtype=getattr(torch, TORCH_NAMES[dtype])),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "converted_by": CONVERTED_BY,
        "content_metadata": {"singleton_local_shards": False, "non_homogeneous_layers": False},
    }
    return state, notes_for(arch, dtype)


def run_config_yaml(arch: Architecture, dtype: str, tp: int, pp: int, ep: int) -> str:
    """run_config.yaml as Megatron-Bridge's loaders read it: `model` to build, `checkpoint` to know what is not there, and
    `tokenizer`, whose files they are told (`load_tokenizer(.., tokenizer_model=..)`)."""
    config = {
        "model": bridge_model(arch, dtype, tp, pp, ep),
        "checkpoint": {
            "ckpt_format": "torch_dist",
            "save_optim": False,
            "save_rng": False,
            "fully_parallel_save": False,
        },
        "tokenizer": {
            "_target_": "megatron.bridge.training.tokenizers.config.TokenizerConfig",
            "tokenizer_type": "HuggingFaceTokenizer",
            "tokenizer_model": None,
        },
    }
    return yaml.safe_dump(config)


def bridge_model(arch: Architecture, dtype: str, tp: int, pp: int, ep: int) -> dict[str, Any]:
    """The `model` section. Gemma 3 has a provider with its norms, windows and two rotary bases; all others are settings of
    the general one."""
    rope, torch_dtype = arch.rope_scaling, _object(f"torch.{TORCH_NAMES[dtype]}")
    model = {
        "_target_": GPT_PROVIDER,
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.head_dim,
        "seq_length": arch.max_position_embeddings,
        "vocab_size": arch.vocab_size,
        "should_pad_vocab": True,
        "make_vocab_size_divisible_by": VOCAB_MULTIPLE,
        "share_embeddings_and_output_weights": arch.tie_word_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": _whole(arch.rotary_base),
        "rotary_percent": arch.rotary_fraction,
        "rotary_interleaved": False,
        "rope_scaling": isinstance(rope, Llama3Rope),
        "rope_scaling_factor": rope.factor if isinstance(rope, Llama3Rope) else 1.0,
        "seq_len_interpolation_factor": rope.factor if isinstance(rope, LinearRope) else None,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.norm_epsilon,
        "layernorm_zero_centered_gamma": arch.zero_centred_norm,
        "gated_linear_unit": True,
        "activation_func": _object("torch.nn.functional.silu"),
        "add_bias_linear": False,
        "add_qkv_bias": arch.qkv_bias,
        "qk_layernorm": arch.qk_norm,
        "softmax_scale": arch.attention_scale,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        **window_settings(arch),
        **_experts(arch, "num_moe_experts"),
        "bf16": dtype == "BF16",
        "fp16": dtype == "F16",
        "params_dtype": torch_dtype,
        "autocast_dtype": torch_dtype,
        "pipeline_dtype": torch_dtype,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "expert_model_parallel_size": ep,
    }
    return {**model, **_gemma3(arch)} if arch.sandwich_norm else model


def _gemma3(arch: Architecture) -> dict[str, Any]:
    windows = [window for window in arch.attention_windows if window is not None]
    period = full_attention_period(arch) or arch.num_layers + 1
    return {
        "_target_": GEMMA3_PROVIDER,
        "rotary_base": [_whole(arch.local_rotary_base or arch.rotary_base), _whole(arch.rotary_base)],
        "rope_scaling_factor": arch.rope_scaling.factor if isinstance(arch.rope_scaling, LinearRope) else 1.0,
        "seq_len_interpolation_factor": None,
        "window_size": windows[0] - 1 if windows else None,
        "window_attn_skip_freq": None,
        "interleaved_attn_pattern": [period - 1, 1],
        "activation_func": _object("megatron.core.activations.fast_gelu"),
    }


def _experts(arch: Architecture, name_of_count: str) -> dict[str, Any]:
    if arch.experts is None:
        return {name_of_count: None}
    return {
        name_of_count: arch.experts.num_experts,
        "moe_layer_freq": 1,
        "moe_ffn_hidden_size": arch.experts.ffn_hidden_size,
        "moe_router_topk": arch.experts.top_k,
        "moe_router_pre_softmax": not arch.experts.normalised,
        "moe_router_score_function": "softmax",
    }


def _object(name: str) -> dict[str, Any]:
    """Bridge's notation for an object that is not called."""
    return {"_target_": name, "_call_": False}


def _whole(value: float) -> float | int:
    """10000 for 10000.0: Megatron-LM's flags for these are whole numbers."""
    return int(value) if float(value).is_integer() else value
