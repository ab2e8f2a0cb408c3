"""Llama 1 to 3.3 and the models that borrow its architecture (SmolLM2, TinyLlama, DeepSeek-R1-Distill-Llama)."""

from checkpoints_conversion.families.base import Family, dense_layer_table

LLAMA = Family(
    model_type="llama",
    hf_class="LlamaForCausalLM",
    fixed_values={
        "attention_bias": False,
        "mlp_bias": False,
        "rope_interleaved": False,  # SmolLM2
        "sliding_window": None,
    },
    harmless_keys=frozenset({"is_llama_config"}),  # SmolLM2
    qkv_bias=False,
    qk_norm=False,
    default_head_dim=None,
    layer_table=dense_layer_table,
)
