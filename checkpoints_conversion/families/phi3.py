"""Phi-3, Phi-3.5, Phi-4-mini and Phi-4: Llama with q, k, v in one tensor, and gate and up in one.

The 128k models stretch their rotary frequencies (longrope); Phi-4-mini rotates three quarters of each head.
"""

from functools import partial
from pathlib import Path
from typing import Any

from checkpoints_conversion import mappings as m
from checkpoints_conversion.architecture import Architecture, LongRope
from checkpoints_conversion.families.base import Family, dense_layer_table
from checkpoints_conversion.families.rope import read_rope
from checkpoints_conversion.families.windows import with_window_everywhere
from oprd_megatron.errors import CheckpointError


def _extend(arch: Architecture, config: dict[str, Any], path: Path) -> Architecture:
    rotated = int(arch.head_dim * arch.rotary_fraction)
    if rotated == 0 or rotated % 2:
        raise CheckpointError(f"{path}: partial_rotary_factor rotates {rotated} dimensions of a head; it must be even")
    if isinstance(arch.rope_scaling, LongRope):
        for key in ("short", "long"):
            count = len(getattr(arch.rope_scaling, f"{key}_factors"))
            if count != rotated // 2:
                raise CheckpointError(f"{path}: {key}_factor has {count} numbers, not {rotated // 2}: one a frequency")
    return with_window_everywhere(arch, config, path, default=None)


def _layer_table(arch: Architecture) -> tuple[m.Mapping, ...]:
    theirs = "model.layers.{layer}"
    rows = {row.megatron_name.removeprefix("decoder.layers.{layer}."): row for row in dense_layer_table(arch)}
    qkv, fc1 = rows["self_attention.linear_qkv.weight"], rows["mlp.linear_fc1.weight"]
    rows["self_attention.linear_qkv.weight"] = m.FusedQKV(
        qkv.megatron_name,
        (f"{theirs}.self_attn.qkv_proj.weight",),
        arch.num_query_groups,
        arch.heads_per_group,
        arch.head_dim,
        arch.hidden_size,
    )
    rows["mlp.linear_fc1.weight"] = m.FusedGatedMLP(
        fc1.megatron_name, (f"{theirs}.mlp.gate_up_proj.weight",), (arch.ffn_hidden_size, arch.hidden_size)
    )
    return tuple(rows.values())


PHI3 = Family(
    model_type="phi3",
    hf_class="Phi3ForCausalLM",
    fixed_values={
        "attention_bias": False,
        "mlp_bias": False,
        "lm_head_bias": False,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "full_attn_mod": 1,  # Phi-4-mini
        "interpolate_factor": 1,  # Phi-4-mini
        "layer_types": None,  # transformers ignores it here
    },
    harmless_keys=frozenset({"auto_map"}),  # code of the repository's own, from before transformers had the family
    qkv_bias=False,
    qk_norm=False,
    default_head_dim=None,
    layer_table=_layer_table,
    read_keys=frozenset({"sliding_window", "partial_rotary_factor", "original_max_position_embeddings"}),
    extend=_extend,
    rope=partial(read_rope, types=("default", "longrope"), may_be_partial=True, default_original_length=4096),
)
