"""Tiny GGUF files, written as llama.cpp's converter writes them: its names, its permutation, its 1 + w."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tests.tiny_models import SPECIAL_TOKENS, randomise, tiny_tokenizer

ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3", "gemma3")
HEADS, GROUPS = 4, 2
_CLASSES: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "phi3": Phi3Config,
    "gemma3": Gemma3TextConfig,
}
_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA3_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(architecture: str, hf_name: str) -> str:
    """GGUF name of a Hugging Face tensor; written out here, so that the library's table is tested too."""
    module, _, kind = hf_name.removeprefix("model.").rpartition(".")
    names = _NAMES | (_GEMMA3_NAMES if architecture == "gemma3" else {})
    if module.startswith("layers."):
        _, layer, rest = module.split(".", 2)
        return f"blk.{layer}.{names[rest]}.{kind}"
    return f"{names[module]}.{kind}"


def tiny_gguf_model(architecture: str, tied: bool = True, **changes: Any) -> PreTrainedModel:
    """Two layers (seven for Gemma, whose sixth is another), width 64, 4 heads in 2 groups, 288 tokens."""
    rope = {"rope_type": "default", "rope_theta": 123456.0}
    settings: dict[str, Any] = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        vocab_size=288,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        rope_parameters=rope,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=3,
    )
    if architecture == "qwen3":
        settings["head_dim"] = 32
    if architecture == "phi3":
        settings["sliding_window"] = 128
    if architecture == "gemma3":
        local = {"rope_type": "default", "rope_theta": 10000.0}
        settings |= dict(
            num_hidden_layers=7,
            head_dim=32,
            sliding_window=32,
            query_pre_attn_scalar=32,
            rope_parameters={"full_attention": rope, "sliding_attention": local},
        )
    model = AutoModelForCausalLM.from_config(_CLASSES[architecture](**{**settings, **changes}), dtype=torch.float32)
    randomise(model, seed=1)
    return model


def write_gguf(
    path: Path,
    architecture: str,
    model: PreTrainedModel,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    settings: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    pre: str = "smollm",
    split: int = 0,
) -> None:
    """Write a model; matrices as `kind`, vectors as F32.

    Args:
        settings: further numbers and strings, by full name.
        tensors: further F32 tensors.
        pre: the tokenizer's rule of cutting.
        split: begin another file after so many tensors.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, architecture, split_max_tensors=split)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if architecture in ("llama", "phi3"):
        writer.add_rope_dimension_count(head_dim)
    else:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture in ("phi3", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    adders: dict[type, Callable[[str, Any], None]] = {
        str: writer.add_string,
        float: writer.add_float32,
        bool: writer.add_bool,
        int: writer.add_uint32,
    }
    for name, value in (settings or {}).items():
        adders[type(value)](name, value)
    _add_tokenizer(writer, config.vocab_size, pre)
    for hf_name, tensor in model.state_dict().items():
        if hf_name != "lm_head.weight" or not config.tie_word_embeddings:
            _add_tensor(writer, architecture, hf_name, tensor.numpy(), kind)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tensor(
    writer: GGUFWriter, architecture: str, hf_name: str, values: np.ndarray, kind: GGMLQuantizationType
) -> None:
    if architecture == "llama" and (".q_proj." in hf_name or ".k_proj." in hf_name):
        heads = HEADS if ".q_proj." in hf_name else GROUPS
        values = values.reshape(heads, 2, len(values) // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)
    if architecture == "gemma3" and hf_name.endswith("norm.weight"):
        values = values + 1
    name = gguf_name(architecture, hf_name)
    if values.ndim == 1:
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)


def _add_tokenizer(writer: GGUFWriter, vocab_size: int, pre: str) -> None:
    vocab = tiny_tokenizer(extra_tokens=("th",)).get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    padded = [*tokens, *(f"[PAD{i}]" for i in range(len(tokens), vocab_size))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(padded)
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 if token in vocab else 5 for token in padded])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
