"""Qwen2, Qwen2.5 and DeepSeek-R1-Distill-Qwen: Llama with biases on q, k and v (always: no config key says so)."""

from checkpoints_conversion import mappings as m
from checkpoints_conversion.architecture import Architecture
from checkpoints_conversion.families.base import Family, dense_layer_table, qkv_row


def _layer_table(arch: Architecture) -> tuple[m.Mapping, ...]:
    return (*dense_layer_table(arch), qkv_row(arch, "bias", None))


QWEN2 = Family(
    model_type="qwen2",
    hf_class="Qwen2ForCausalLM",
    fixed_values={"use_sliding_window": False, "use_mrope": False},
    harmless_keys=frozenset({"sliding_window", "max_window_layers"}),  # unused unless use_sliding_window
    qkv_bias=True,
    qk_norm=False,
    default_head_dim=None,
    layer_table=_layer_table,
)
