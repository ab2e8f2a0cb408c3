"""Tiny random models and a tiny tokenizer, built in milliseconds, for tests that need a whole Hugging Face directory.

Norm weights and biases are random too: with transformers' own initialisation (ones and zeros) a swapped or forgotten
norm or bias would go unnoticed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.core_model_loading import revert_weight_conversion

Family = Literal["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "mistral", "phi3", "gemma3_text"]

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
EOS_ID, PAD_ID = 2, 3
WINDOW = 6
"""Positions that a query sees in Mistral's layers and in Gemma's with a window."""
ORIGINAL_LENGTH = 64
"""Phi-3's sequences longer than this are rotated by the long factors."""
TOKENIZER_SIZE = len(SPECIAL_TOKENS) + 256
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(
    out_dir: Path | str | None = None, *, chat_template: bool = True, extra_tokens: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: 4 special tokens (ids 0..3), then one token per byte (ids 4..259), then `extra_tokens`.

    Args:
        out_dir: Saved there with `save_pretrained`, if given.
        chat_template: Give it a ChatML template; False leaves it without one.
        extra_tokens: Further tokens at the end of the vocabulary, to make two tokenizers differ.

    Returns:
        The tokenizer; `eos_token` is `<|im_end|>` (id 2), `pad_token` is `<|pad|>` (id 3).
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *letters, *extra_tokens])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=4096,
    )
    if chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    if out_dir is not None:
        tokenizer.save_pretrained(out_dir)
    return tokenizer


def tiny_config(
    family: Family,
    *,
    tied: bool = True,
    num_layers: int = 4,
    hidden_size: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    vocab_size: int = 288,
    ffn: int = 64,
    num_experts: int = 4,
    top_k: int = 2,
    normalised: bool = True,
) -> PreTrainedConfig:
    """The config of a tiny model of one family; llama also gets a non-default rope theta, as real models have. `ffn` is an
    expert's where there are `num_experts`; Mixtral's are always `normalised`."""
    common = dict(
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        vocab_size=vocab_size,
        tie_word_embeddings=tied,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        bos_token_id=0,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    if family == "llama":
        return LlamaConfig(**common)
    if family == "qwen2":
        return Qwen2Config(**common)
    if family == "mixtral":
        return MixtralConfig(**common, num_local_experts=num_experts, num_experts_per_tok=top_k)
    if family == "qwen3_moe":
        routing = dict(num_experts=num_experts, num_experts_per_tok=top_k, norm_topk_prob=normalised)
        return Qwen3MoeConfig(**common, **routing, moe_intermediate_size=ffn, head_dim=hidden_size // heads)
    if family == "mistral":
        return MistralConfig(**common, sliding_window=WINDOW, head_dim=hidden_size // heads)
    if family == "phi3":
        frequencies = hidden_size // heads // 4  # of the half of each head that is rotated
        rope = dict(rope_type="longrope", rope_theta=100000.0, partial_rotary_factor=0.5)
        rope |= dict(
            short_factor=[1.0 + 0.1 * i for i in range(frequencies)],
            long_factor=[2.0 + i for i in range(frequencies)],
        )
        phi = dict(rope_parameters=rope, original_max_position_embeddings=ORIGINAL_LENGTH, sliding_window=None)
        return Phi3Config(**{**common, **phi})
    if family == "gemma3_text":
        gemma = dict(
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
            layer_types=["full_attention" if index % 3 == 1 else "sliding_attention" for index in range(num_layers)],
            sliding_window=WINDOW,
            query_pre_attn_scalar=hidden_size // heads + 3,
            head_dim=hidden_size // heads,
        )
        return Gemma3TextConfig(**{**common, **gemma})
    return Qwen3Config(**common, head_dim=hidden_size // heads)


def randomise(model: PreTrainedModel, seed: int, std: float = 0.3) -> None:
    """Overwrite every parameter with seeded noise: norm weights around 1 (Gemma: 0), everything else around 0, in place.

    `std` is large for such a small model, so that the next-token distribution is far from uniform.
    """
    generator = torch.Generator().manual_seed(seed)
    centre = 0.0 if model.config.model_type.startswith("gemma") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(centre + 0.2 * noise if "norm" in name else std * noise)


def as_in_files(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a model by parameter name, under the names and in the shapes that transformers saves parameters with: it
    keeps a layer's experts in one tensor, and files do not."""
    return {name: tensor.clone() for name, tensor in revert_weight_conversion(model, tensors).items()}


def tiny_hf_model(
    family: Family,
    out_dir: Path | str,
    *,
    tied: bool = True,
    num_layers: int = 4,
    hidden_size: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    vocab_size: int = 288,
    seed: int = 0,
    ffn: int = 64,
    std: float = 0.3,
    num_experts: int = 4,
    top_k: int = 2,
    normalised: bool = True,
) -> PreTrainedModel:
    """Build a tiny random model, save it with its tokenizer as a Hugging Face directory, and return it.

    Args:
        std: Spread of the weights; 0.3 makes peaked next-token distributions, 0.1 keeps hidden states near 1 in size.
        num_experts, top_k, normalised: see `tiny_config`.

    Returns:
        The model: fp32, CPU, eval mode.
    """
    shape = dict(tied=tied, num_layers=num_layers, hidden_size=hidden_size, heads=heads, kv_heads=kv_heads)
    routing = dict(num_experts=num_experts, top_k=top_k, normalised=normalised)
    config = tiny_config(family, **shape, vocab_size=vocab_size, ffn=ffn, **routing)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model, seed, std)
    model.save_pretrained(out_dir)
    tiny_tokenizer(out_dir)
    return model
