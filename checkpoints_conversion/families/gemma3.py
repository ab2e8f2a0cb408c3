"""Gemma 3, text only (270M, 1B, and the text part of the larger ones).

Against Llama: every norm multiplies by 1 + weight; queries and keys are normed, and so are the outputs of attention and
MLP; five of six layers have a window and a rotary base of their own; the gate is a GELU; embeddings are scaled by the
square root of the width.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoints_conversion import mappings as m
from checkpoints_conversion.architecture import Architecture
from checkpoints_conversion.families.base import Family, dense_layer_table
from checkpoints_conversion.families.qwen3 import qk_norm_rows
from checkpoints_conversion.families.rope import read_two_ropes
from checkpoints_conversion.families.values import read_number, read_size
from oprd_megatron.errors import CheckpointError

_NORMS = {
    "pre_mlp_layernorm": "pre_feedforward_layernorm",
    "self_attention.linear_proj.post_layernorm": "post_attention_layernorm",
    "mlp.linear_fc2.post_layernorm": "post_feedforward_layernorm",
}
"""Megatron (the names that Megatron-Bridge has too) -> Hugging Face, within a layer."""


def _extend(arch: Architecture, config: dict[str, Any], path: Path) -> Architecture:
    window = read_size(config, "sliding_window", path, default=4096)
    scalar = read_number({"query_pre_attn_scalar": 256, **config}, "query_pre_attn_scalar", path)
    return replace(
        arch,
        attention_windows=tuple(window if local else None for local in _local_layers(config, arch.num_layers, path)),
        attention_scale=scalar**-0.5,
        activation="gelu_tanh",
        zero_centred_norm=True,
        sandwich_norm=True,
        embedding_scale=arch.hidden_size**0.5,
    )


def _local_layers(config: dict[str, Any], num_layers: int, path: Path) -> list[bool]:
    """Which layers have a window: `layer_types`, or all but each `sliding_window_pattern`-th."""
    kinds = {"sliding_attention": True, "full_attention": False}
    types = config.get("layer_types")
    if types is None:
        period = read_size(config, "sliding_window_pattern", path, default=6)
        if config.get("_sliding_window_pattern", period) != period:
            raise CheckpointError(f"{path}: _sliding_window_pattern is not what sliding_window_pattern says, {period}")
        return [bool((index + 1) % period) for index in range(num_layers)]
    if not isinstance(types, list) or len(types) != num_layers or not all(kind in tuple(kinds) for kind in types):
        raise CheckpointError(f"{path}: layer_types must be {num_layers} times one of {', '.join(kinds)}")
    return [kinds[kind] for kind in types]


def _layer_table(arch: Architecture) -> tuple[m.Mapping, ...]:
    rows = {row.megatron_name: row for row in (*dense_layer_table(arch), *qk_norm_rows(arch))}
    for ours, theirs in _NORMS.items():
        name = f"decoder.layers.{{layer}}.{ours}.weight"
        rows[name] = m.Replicated(name, (f"model.layers.{{layer}}.{theirs}.weight",), arch.hidden_size)
    return tuple(rows.values())


GEMMA3 = Family(
    model_type="gemma3_text",
    hf_class="Gemma3ForCausalLM",
    fixed_values={
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    harmless_keys=frozenset({"cache_implementation"}),
    qkv_bias=False,
    qk_norm=True,
    default_head_dim=256,
    layer_table=_layer_table,
    read_keys=frozenset(
        {
            "rope_local_base_freq",
            "query_pre_attn_scalar",
            "sliding_window",
            "layer_types",
            "sliding_window_pattern",
            "_sliding_window_pattern",
        }
    ),
    extend=_extend,
    default_tied=True,
    rope=read_two_ropes,
)
