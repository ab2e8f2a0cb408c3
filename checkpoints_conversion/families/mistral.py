"""Mistral 7B, Nemo and Small (text): Llama, in early releases with a sliding window in every layer."""

from pathlib import Path
from typing import Any

from checkpoints_conversion.architecture import Architecture
from checkpoints_conversion.families.base import Family, dense_layer_table
from checkpoints_conversion.families.windows import with_window_everywhere


def _extend(arch: Architecture, config: dict[str, Any], path: Path) -> Architecture:
    return with_window_everywhere(arch, config, path, default=4096)


MISTRAL = Family(
    model_type="mistral",
    hf_class="MistralForCausalLM",
    fixed_values={"attention_bias": False, "layer_types": None},  # transformers ignores layer_types here
    harmless_keys=frozenset(),
    qkv_bias=False,
    qk_norm=False,
    default_head_dim=None,
    layer_table=dense_layer_table,
    read_keys=frozenset({"sliding_window"}),
    extend=_extend,
)
