"""Mixtral 8x7B and 8x22B: Mistral with experts in every layer, whose weights are always scaled to sum to one."""

from pathlib import Path
from typing import Any

from checkpoints_conversion import mappings as m
from checkpoints_conversion.architecture import Architecture
from checkpoints_conversion.families.base import Family, attention_rows
from checkpoints_conversion.families.experts import HARMLESS_ROUTER_KEYS, expert_rows, with_experts
from checkpoints_conversion.families.values import read_size
from checkpoints_conversion.families.windows import with_window_everywhere


def _extend(arch: Architecture, config: dict[str, Any], path: Path) -> Architecture:
    return with_experts(
        with_window_everywhere(arch, config, path, default=None),
        config,
        path,
        num_experts=read_size(config, "num_local_experts", path),
        ffn_hidden_size=arch.ffn_hidden_size,
        normalised=True,
    )


def _layer_table(arch: Architecture) -> tuple[m.Mapping, ...]:
    return (*attention_rows(arch), *expert_rows(arch))


MIXTRAL = Family(
    model_type="mixtral",
    hf_class="MixtralForCausalLM",
    fixed_values={"router_jitter_noise": 0.0},
    harmless_keys=HARMLESS_ROUTER_KEYS,
    qkv_bias=False,
    qk_norm=False,
    default_head_dim=None,
    layer_table=_layer_table,
    read_keys=frozenset({"num_local_experts", "num_experts_per_tok", "sliding_window"}),
    extend=_extend,
)
