"""Qwen3 (dense): Llama with an RMS norm on every query and key head, and a head_dim of its own."""

from checkpoints_conversion import mappings as m
from checkpoints_conversion.architecture import Architecture
from checkpoints_conversion.families.base import Family, dense_layer_table


def qk_norm_rows(arch: Architecture) -> tuple[m.Mapping, ...]:
    """The norms on every query and key head."""
    return tuple(
        m.Replicated(
            f"decoder.layers.{{layer}}.self_attention.{part}_layernorm.weight",
            (f"model.layers.{{layer}}.self_attn.{part}_norm.weight",),
            arch.head_dim,
        )
        for part in "qk"
    )


def _layer_table(arch: Architecture) -> tuple[m.Mapping, ...]:
    return (*dense_layer_table(arch), *qk_norm_rows(arch))


QWEN3 = Family(
    model_type="qwen3",
    hf_class="Qwen3ForCausalLM",
    fixed_values={"attention_bias": False, "use_sliding_window": False},
    harmless_keys=frozenset({"sliding_window", "max_window_layers"}),  # unused unless use_sliding_window
    qkv_bias=False,
    qk_norm=True,
    default_head_dim=128,
    layer_table=_layer_table,
)
