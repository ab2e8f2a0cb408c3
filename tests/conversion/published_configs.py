"""config.json as published with the weights, for models whose families the tests otherwise know only as tiny models."""

from typing import Any

MISTRAL_7B_V01: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
"""Mistral-7B-v0.1 and Mistral-7B-Instruct-v0.1: every layer has a window."""

MISTRAL_7B_V03 = {
    **MISTRAL_7B_V01, "attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None,
    "transformers_version": "4.42.0.dev0", "vocab_size": 32768,
}  # fmt: skip
"""Mistral-7B-v0.3 and Mistral-7B-Instruct-v0.3."""

MISTRAL_NEMO = {
    **MISTRAL_7B_V03, "head_dim": 128, "hidden_size": 5120, "max_position_embeddings": 131072, "num_hidden_layers": 40,
    "transformers_version": "4.43.0.dev0", "vocab_size": 131072,
}  # fmt: skip
"""Mistral-Nemo-Base-2407: 32 heads of 128 in a width of 5120."""

PHI3_MINI_4K: dict[str, Any] = {
    "_name_or_path": "Phi-3-mini-4k-instruct", "architectures": ["Phi3ForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"
    },
    "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "phi3",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.40.2", "use_cache": True, "vocab_size": 32064,
}  # fmt: skip
"""Phi-3-mini-4k-instruct."""

PHI3_MINI_128K = {
    **PHI3_MINI_4K, "_name_or_path": "Phi-3-mini-128k-instruct", "max_position_embeddings": 131072,
    "rope_scaling": {
        "long_factor": [1.0 + 1.3 * i for i in range(48)], "short_factor": [1.05 + 0.04 * i for i in range(48)],
        "type": "longrope",
    },
    "sliding_window": 262144,
}  # fmt: skip
"""Phi-3-mini-128k-instruct and Phi-3.5-mini-instruct, but for the values of their factors; first published with type su."""

PHI4_MINI = {
    **PHI3_MINI_4K, "_name_or_path": "Phi-4-mini-instruct",
    "auto_map": {**PHI3_MINI_4K["auto_map"], "AutoTokenizer": "Xenova/gpt-4o"},
    "bos_token_id": 199999, "eos_token_id": 199999, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False,
    "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 24, "num_key_value_heads": 8,
    "pad_token_id": 199999, "partial_rotary_factor": 0.75,
    "rope_scaling": {
        "long_factor": [
            1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
            2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424,
            6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252,
            16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6,
            32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
        ],
        "short_factor": [1.0] * 48, "type": "longrope",
    },
    "sliding_window": 262144, "tie_word_embeddings": True, "transformers_version": "4.45.0", "vocab_size": 200064,
}  # fmt: skip
"""Phi-4-mini-instruct."""

PHI4: dict[str, Any] = {
    "_name_or_path": "phi-4", "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 100257, "embd_pdrop": 0.0, "eos_token_id": 100265, "hidden_act": "silu", "hidden_size": 5120,
    "initializer_range": 0.02, "intermediate_size": 17920, "max_position_embeddings": 16384, "model_type": "phi3",
    "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 10,
    "original_max_position_embeddings": 16384, "pad_token_id": 100349, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 250000, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.47.0", "use_cache": True, "vocab_size": 100352,
}  # fmt: skip
"""phi-4, 14B."""

GEMMA3_1B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
    "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
    "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144,
}  # fmt: skip
"""gemma-3-1b-it: the layers with a window follow from a pattern."""

GEMMA3_270M = {
    **{key: GEMMA3_1B[key] for key in GEMMA3_1B if key not in ("cache_implementation", "sliding_window_pattern")},
    "_sliding_window_pattern": 6, "eos_token_id": 1, "hidden_size": 640, "intermediate_size": 2048,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3, "num_hidden_layers": 18,
    "rope_local_base_freq": 10000.0, "rope_theta": 1000000.0, "transformers_version": "4.55.0.dev0",
    "use_bidirectional_attention": False,
}  # fmt: skip
"""gemma-3-270m: the layers with a window are listed."""
