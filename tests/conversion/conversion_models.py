"""Tiny random Hugging Face directories, and a fake of mcore's GPTModel that holds the same weights.

Vocabulary and widths are odd on purpose (509 tokens, 6 heads in 3 groups, head_dim not hidden/heads in Qwen3), and
norms and biases are random: with transformers' ones and zeros a swapped norm or a forgotten bias would go unnoticed.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from checkpoints_conversion import Architecture, Sharding

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "mistral", "phi3", "gemma3_text")
MOE_FAMILIES = ("qwen3_moe", "mixtral")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 123456.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 4.0],
}
_CLASSES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM),
}
_SETTINGS: dict[str, dict[str, object]] = {
    "mistral": {"head_dim": 16, "sliding_window": 5},
    "phi3": {
        "original_max_position_embeddings": 16,
        "pad_token_id": 0,
        "sliding_window": 7,
        "rope_parameters": LONG_ROPE,
    },
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 100,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 123456.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 4321.0},
        },
    },
}
"""What a family's tiny config has besides, or instead."""


def tiny_config(family: str, tied: bool = False, **changes: object) -> PreTrainedConfig:
    """3 layers, width 48, 6 heads in 3 groups, 509 tokens; 4 experts."""
    settings: dict[str, object] = dict(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        vocab_size=509,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 123456.0},
    )
    if family in ("qwen3", "qwen3_moe"):
        settings["head_dim"] = 16
    if family == "qwen3_moe":
        settings |= dict(num_experts=4, moe_intermediate_size=24)
    if family == "mixtral":
        settings["num_local_experts"] = 4
    if family in MOE_FAMILIES:
        settings["num_experts_per_tok"] = 2
    return _CLASSES[family][0](**copy.deepcopy({**settings, **_SETTINGS.get(family, {}), **changes}))


def write_tiny_model(
    family: str,
    out_dir: Path,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "5GB",
    seed: int = 0,
    **changes: object,
) -> PreTrainedModel:
    """Save a random tiny model and return it; `changes` go into its config."""
    generator = torch.Generator().manual_seed(seed)
    model = _CLASSES[family][1](tiny_config(family, tied, **changes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(out_dir, max_shard_size=shard_size)
    return model


class Linear(nn.Module):
    """A weight, and what else mcore's linear layers may hold."""

    def __init__(self, rows: int, columns: int, bias: bool = False, norm: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((rows, columns), torch.nan))
        if bias:
            self.bias = nn.Parameter(torch.full((rows,), torch.nan))
        if norm is not None:
            self.layer_norm_weight = nn.Parameter(torch.full((norm,), torch.nan))


class Norm(nn.Module):
    """A norm weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), torch.nan))


class Grouped(nn.Module):
    """The weights of several linear layers, as Transformer Engine's grouped one names them."""

    def __init__(self, count: int, rows: int, columns: int) -> None:
        super().__init__()
        for number in range(count):
            self.register_parameter(f"weight{number}", nn.Parameter(torch.full((rows, columns), torch.nan)))


@dataclass(frozen=True)
class ExpertPlace:
    """Which experts a rank holds, and how they are cut (None: like the rest)."""

    ep_rank: int = 0
    ep_size: int = 1
    tp_size: int | None = None


class FakeExperts(nn.Module):
    """Names and local shapes of mcore's MoELayer: SequentialMLP, or TEGroupedMLP (`grouped`)."""

    def __init__(self, arch: Architecture, sharding: Sharding, place: ExpertPlace, grouped: bool) -> None:
        super().__init__()
        assert arch.experts is not None
        width, count = arch.hidden_size, arch.experts.num_experts // place.ep_size
        ffn = arch.experts.ffn_hidden_size // (place.tp_size or sharding.tp_size)
        self.local_expert_indices = [place.ep_rank * count + number for number in range(count)]
        self.router = Linear(arch.experts.num_experts, width)
        self.experts = nn.Module()
        if grouped:
            self.experts.linear_fc1, self.experts.linear_fc2 = (
                Grouped(count, 2 * ffn, width),
                Grouped(count, width, ffn),
            )
            return
        self.experts.local_experts = nn.ModuleList(nn.Module() for _ in range(count))
        for expert in self.experts.local_experts:
            expert.linear_fc1, expert.linear_fc2 = Linear(2 * ffn, width), Linear(width, ffn)


class FakeLayer(nn.Module):
    """Names and local shapes of mcore's TransformerLayer, local spec or Transformer Engine's (`fused`)."""

    def __init__(
        self, arch: Architecture, sharding: Sharding, layer_number: int, fused: bool, place: ExpertPlace
    ) -> None:
        super().__init__()
        width = arch.hidden_size
        groups = sharding.num_query_groups_padded // sharding.tp_size
        heads = groups * (arch.num_attention_heads // arch.num_query_groups)
        ffn = arch.ffn_hidden_size // sharding.tp_size
        fused_norm = width if fused else None
        self.layer_number = layer_number
        if not fused:
            self.input_layernorm = Norm(width)
        if not fused or arch.experts:
            self.pre_mlp_layernorm = Norm(width)
        self.self_attention = nn.Module()
        qkv_rows = (heads + 2 * groups) * arch.head_dim
        self.self_attention.linear_qkv = Linear(qkv_rows, width, bias=arch.qkv_bias, norm=fused_norm)
        self.self_attention.linear_proj = Linear(width, heads * arch.head_dim)
        if arch.sandwich_norm:
            self.self_attention.linear_proj.post_layernorm = Norm(width)
        if arch.qk_norm:
            self.self_attention.q_layernorm = Norm(arch.head_dim)
            self.self_attention.k_layernorm = Norm(arch.head_dim)
        if arch.experts:
            self.mlp = FakeExperts(arch, sharding, place, grouped=fused)
            return
        self.mlp = nn.Module()
        self.mlp.linear_fc1 = Linear(2 * ffn, width, norm=fused_norm)
        self.mlp.linear_fc2 = Linear(width, ffn)
        if arch.sandwich_norm:
            self.mlp.linear_fc2.post_layernorm = Norm(width)


class FakeGPT(nn.Module):
    """Names and local shapes of one GPTModel chunk that holds the layers `layer_numbers` (1-based, global)."""

    def __init__(
        self,
        arch: Architecture,
        sharding: Sharding,
        layer_numbers: list[int],
        first: bool = True,
        last: bool = True,
        fused: bool = False,
        place: ExpertPlace = ExpertPlace(),
    ) -> None:
        super().__init__()
        vocab = sharding.vocab_size_padded // sharding.tp_size
        if first:
            self.embedding = nn.Module()
            self.embedding.word_embeddings = Linear(vocab, arch.hidden_size)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(FakeLayer(arch, sharding, n, fused, place) for n in layer_numbers)
        if last:
            self.decoder.final_layernorm = Norm(arch.hidden_size)
        if last and not (arch.tie_word_embeddings and first):
            self.output_layer = Linear(vocab, arch.hidden_size)
