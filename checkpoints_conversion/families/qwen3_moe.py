"""Qwen3-MoE (30B-A3B, 235B-A22B, Coder): Qwen3 with experts in every layer."""

from pathlib import Path
from typing import Any

from checkpoints_conversion import mappings as m
from checkpoints_conversion.architecture import Architecture
from checkpoints_conversion.families.base import Family, attention_rows
from checkpoints_conversion.families.experts import HARMLESS_ROUTER_KEYS, expert_rows, with_experts
from checkpoints_conversion.families.qwen3 import qk_norm_rows
from checkpoints_conversion.families.values import read_flag, read_size
from checkpoints_conversion.files.messages import shown
from oprd_megatron.errors import CheckpointError

_COUNTS = ("num_experts", "num_local_experts")
"""The number of experts, as Qwen published it and as transformers 5 writes it."""


def _extend(arch: Architecture, config: dict[str, Any], path: Path) -> Architecture:
    dense = config.get("mlp_only_layers")
    if dense not in (None, []):
        raise CheckpointError(
            f"{path}: mlp_only_layers is {shown(dense)}; only [] is supported, experts in every layer"
        )
    given = {key: read_size(config, key, path) for key in _COUNTS if config.get(key) is not None}
    if len(set(given.values())) > 1:
        raise CheckpointError(f"{path}: num_experts and num_local_experts disagree {given}; keep the right one")
    return with_experts(
        arch,
        config,
        path,
        num_experts=next(iter(given.values())) if given else read_size(config, "num_experts", path),
        ffn_hidden_size=read_size(config, "moe_intermediate_size", path),
        normalised=read_flag(config, "norm_topk_prob", path),
    )


def _layer_table(arch: Architecture) -> tuple[m.Mapping, ...]:
    return (*attention_rows(arch), *qk_norm_rows(arch), *expert_rows(arch))


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    hf_class="Qwen3MoeForCausalLM",
    fixed_values={"attention_bias": False, "use_sliding_window": False, "decoder_sparse_step": 1},
    harmless_keys=HARMLESS_ROUTER_KEYS | {"sliding_window", "max_window_layers"},  # unused unless use_sliding_window
    qkv_bias=False,
    qk_norm=True,
    default_head_dim=None,
    layer_table=_layer_table,
    read_keys=frozenset(
        {*_COUNTS, "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "mlp_only_layers"}
    ),
    extend=_extend,
)
