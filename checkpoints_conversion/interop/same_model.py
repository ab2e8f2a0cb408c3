"""Whether the settings stored in a checkpoint and a config.json describe one model.

Tensors of a right shape may belong to another model: rotary base, the norms' epsilon, windows and routing have no shape. So
the arguments in common.pt (Megatron-LM) and the `model` section of run_config.yaml (Megatron-Bridge) are brought to one set of
names and meanings, facts, and compared with those of config.json:

    expected    fact -> value, from config.json
    found       fact -> value, and the name and value that the checkpoint has for it

A fact that a checkpoint does not state is not compared. What cannot change the result (dtype, parallel sizes, paths, dropout)
is no fact. Settings may come from strangers: any value of any type is compared and shown, and none is trusted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints_conversion.architecture import Architecture, LinearRope, Llama3Rope, LongRope
from checkpoints_conversion.files.messages import quoted
from checkpoints_conversion.interop.notes import lacking_in_bridge, lacking_in_megatron_lm
from checkpoints_conversion.interop.settings import CONVERTED_BY, RUN_CONFIG, bridge_model, megatron_args
from oprd_megatron.errors import CheckpointError

Settings = Mapping[str, Any]
MAX_LAYERS = 10_000
"""More are not believed."""


@dataclass(frozen=True)
class Fact:
    """What a checkpoint says: its meaning, and the name and value that it is written with."""

    value: Any
    name: str
    written: Any


_BOTH = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "normalization",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "softmax_scale",
    "multi_latent_attention",
    "ffn_hidden_size",
    "moe_ffn_hidden_size",
    "moe_layer_freq",
    "moe_router_topk",
    "moe_router_pre_softmax",
    "moe_router_score_function",
    "moe_router_topk_scaling_factor",
    "moe_shared_expert_intermediate_size",
)
"""Facts that Megatron-LM and mcore name alike."""
_MEGATRON_LM = {
    "norm_epsilon": "norm_epsilon",
    "zero_centred_norm": "apply_layernorm_1p",
    "num_experts": "num_experts",
    "squared_relu": "squared_relu",
    "swiglu": "swiglu",
}
_BRIDGE = {
    "norm_epsilon": "layernorm_epsilon",
    "zero_centred_norm": "layernorm_zero_centered_gamma",
    "num_experts": "num_moe_experts",
    "tied_embeddings": "share_embeddings_and_output_weights",
    "gated_linear_unit": "gated_linear_unit",
}
"""Fact -> its name in either package, where they differ."""
_ACTIVATIONS = {"fast_gelu": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "openai_gelu": "gelu_tanh"}


def check_same_model(arch: Architecture, common: Settings, run_config: Settings | None, where: Path) -> list[str]:
    """Compare a checkpoint's settings with an architecture.

    Args:
        arch: from config.json.
        common: of `read_common`: `args` is a Namespace, or an inert record of one.
        run_config: of `read_run_config`.
        where: the checkpoint, for messages.

    Returns:
        What could not be compared, a line each.

    Raises:
        CheckpointError: a setting that changes the result differs; names it and both values.
    """
    args, model = _settings(common, "args"), _settings(run_config, "model")
    lacking: list[str] = []
    of_args = of_model = _facts_of_architecture(arch)
    is_ours = common.get("converted_by") == CONVERTED_BY
    if is_ours:  # what neither package can say of this architecture is stored as the nearest that it can
        of_args = _values(_facts_of_args(megatron_args(arch, "BF16", padded_vocab_size=arch.vocab_size)))
        of_model = _values(_facts_of_model(bridge_model(arch, "BF16", 1, 1, 1)))
    if args is not None:
        _compare(of_args, _facts_of_args(args), f"{where}/common.pt: args")
        lacking += [f"Megatron-LM has no {what}" for what in lacking_in_megatron_lm(arch)] if model is None else []
    if model is not None:
        _compare(of_model, _facts_of_model(model), f"{where}/{RUN_CONFIG}: model")
        lacking += [f"Megatron-Bridge has no {what}" for what in lacking_in_bridge(arch)]
    if args is None and model is None:
        return [f"{where}: stores no settings of its model; only names and shapes are compared with config.json"]
    if is_ours:
        return []
    return [f"{where}: what wrote it cannot have computed what config.json says; {line}" for line in lacking]


def _settings(holder: Settings | None, key: str) -> Settings | None:
    """A group of settings: a dict, or an object with attributes."""
    value = None if holder is None else holder.get(key)
    if value is None or isinstance(value, dict):
        return value
    return vars(value) if hasattr(value, "__dict__") else None


def _facts_of_architecture(arch: Architecture) -> dict[str, Any]:
    rope, experts = arch.rope_scaling, arch.experts
    facts: dict[str, Any] = {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.head_dim,
        "position_embedding_type": "rope",
        "rotary_base": arch.rotary_base,
        "local_rotary_base": arch.local_rotary_base or arch.rotary_base,
        "rotary_percent": arch.rotary_fraction,
        "rotary_interleaved": False,
        "normalization": "RMSNorm",
        "norm_epsilon": arch.norm_epsilon,
        "zero_centred_norm": arch.zero_centred_norm,
        "add_bias_linear": False,
        "add_qkv_bias": arch.qkv_bias,
        "qk_layernorm": arch.qk_norm,
        "softmax_scale": arch.attention_scale or arch.head_dim**-0.5,
        "multi_latent_attention": False,
        "tied_embeddings": arch.tie_word_embeddings,
        "gated_linear_unit": True,
        "activation": arch.activation,
        "squared_relu": False,
        "attention_windows": arch.attention_windows or (None,) * arch.num_layers,
        "num_experts": experts.num_experts if experts else None,
    }
    if arch.activation == "silu":
        facts["swiglu"] = True
    if not isinstance(rope, LongRope):
        facts["rope_scaling"] = None if rope is None else (_kind(rope), rope.factor)
    if isinstance(rope, Llama3Rope):
        facts["rope_constants"] = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position_embeddings
    if experts is None:
        return facts | {"ffn_hidden_size": arch.ffn_hidden_size}
    return facts | {
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_layer_freq": 1,
        "moe_router_topk": experts.top_k,
        "moe_router_pre_softmax": not experts.normalised,
        "moe_router_score_function": "softmax",
        "moe_router_topk_scaling_factor": 1.0,
        "moe_shared_expert_intermediate_size": None,
    }


def _kind(rope: Llama3Rope | LinearRope) -> str:
    return "llama3" if isinstance(rope, Llama3Rope) else "linear"


def _facts_of_args(args: Settings) -> dict[str, Fact]:
    facts = _shared_facts(args, _MEGATRON_LM)
    if "untie_embeddings_and_output_weights" in args:
        facts["tied_embeddings"] = _fact(args, "untie_embeddings_and_output_weights", lambda untied: not untied)
    if "use_rope_scaling" in args:
        facts["rope_scaling"] = Fact(None, "use_rope_scaling", args["use_rope_scaling"])
    if args.get("use_rope_scaling"):
        facts["rope_scaling"] = _fact({"rope_scaling_factor": 8.0, **args}, "rope_scaling_factor", _scaled("llama3"))
    elif args.get("rotary_seq_len_interpolation_factor") not in (None, 1):
        facts["rope_scaling"] = _fact(args, "rotary_seq_len_interpolation_factor", _scaled("linear"))
    return facts


def _facts_of_model(model: Settings) -> dict[str, Fact]:
    facts = _shared_facts(model, _BRIDGE)
    provider, base = str(model.get("_target_")), model.get("rotary_base")
    if isinstance(base, list | tuple) and len(base) == 2:  # Gemma 3
        facts["local_rotary_base"], facts["rotary_base"] = (Fact(value, "rotary_base", base) for value in base)
    if isinstance(model.get("activation_func"), dict):
        facts["activation"] = _fact(model, "activation_func", _activation)
    if "rope_scaling" in model:
        facts["rope_scaling"] = Fact(None, "rope_scaling", model["rope_scaling"])
    if "Llama3" in provider and "scale_factor" in model:  # before Bridge 0.3
        facts["rope_scaling"] = _fact(model, "scale_factor", _scaled("llama3"))
        names = ("low_freq_factor", "high_freq_factor", "old_context_len")
        facts["rope_constants"] = Fact(tuple(model.get(name) for name in names), ", ".join(names), "not those")
    elif "Gemma3" in provider or model.get("rope_scaling"):
        kind = "linear" if "Gemma3" in provider else "llama3"
        facts["rope_scaling"] = _fact({"rope_scaling_factor": 1.0, **model}, "rope_scaling_factor", _scaled(kind))
    elif model.get("seq_len_interpolation_factor") not in (None, 1):
        facts["rope_scaling"] = _fact(model, "seq_len_interpolation_factor", _scaled("linear"))
    return facts


def _fact(settings: Settings, name: str, meaning: Any) -> Fact:
    return Fact(meaning(settings[name]), name, settings[name])


def _scaled(kind: str) -> Any:
    return lambda factor: None if kind == "linear" and factor in (None, 1) else (kind, factor)


def _activation(entry: dict[str, Any]) -> str:
    name = str(entry.get("_target_")).rpartition(".")[2]
    return _ACTIVATIONS.get(name, name)


def _shared_facts(settings: Settings, names: Mapping[str, str]) -> dict[str, Fact]:
    """What both packages state alike, but for some names. What they leave None is what mcore takes for it."""
    named = dict(zip(_BOTH, _BOTH, strict=True)) | dict(names)
    facts = {
        fact: Fact(settings[name], name, settings[name])
        for fact, name in named.items()
        if name in settings and (settings[name] is not None or fact not in _DERIVED)
    }
    if settings.get("group_query_attention") is False:
        heads = settings.get("num_attention_heads")
        facts["num_query_groups"] = Fact(heads, "group_query_attention", False)
    if "ffn_hidden_size" in facts:
        facts.setdefault("moe_ffn_hidden_size", facts["ffn_hidden_size"])
    head_dim = settings.get("kv_channels")
    if (
        "softmax_scale" in settings
        and settings["softmax_scale"] is None
        and isinstance(head_dim, int)
        and 0 < head_dim < 2**20
    ):
        facts["softmax_scale"] = Fact(head_dim**-0.5, "softmax_scale", None)
    frequency = settings.get("moe_layer_freq")
    if isinstance(frequency, list | tuple) and all(every == 1 for every in frequency):
        facts["moe_layer_freq"] = Fact(1, "moe_layer_freq", frequency)
    if "window_size" in settings:
        facts["attention_windows"] = Fact(_windows(settings), "window_size", settings["window_size"])
    return facts


_DERIVED = (
    "num_query_groups",
    "kv_channels",
    "softmax_scale",
    "ffn_hidden_size",
    "moe_ffn_hidden_size",
    "moe_router_topk_scaling_factor",
)
"""None is not a value of these but leave to derive them from others, which are compared, or from shapes, or for 1."""


def _windows(settings: Settings) -> Any:
    """For each layer, how many positions a query sees, its own included; the setting itself if it is none that mcore takes."""
    window, num_layers = settings["window_size"], settings.get("num_layers")
    if not isinstance(num_layers, int) or not 0 < num_layers <= MAX_LAYERS:
        return window
    if window is None:
        return (None,) * num_layers
    before = window[0] if isinstance(window, list | tuple) and window else window
    pattern = settings.get("interleaved_attn_pattern")
    frequency = pattern if isinstance(pattern, list | tuple) else settings.get("window_attn_skip_freq")
    if not isinstance(before, int) or not isinstance(frequency, int | list | tuple | None):
        return window
    if isinstance(pattern, list | tuple) and all(isinstance(part, int) for part in pattern):
        frequency = sum(pattern)
    if isinstance(frequency, list | tuple):
        has_window = [bool(flag) for flag in frequency]
    else:
        has_window = [not frequency or layer % frequency != 0 for layer in range(1, num_layers + 1)]
    return tuple(before + 1 if flag and before >= 0 else None for flag in has_window)  # -1: all


def _values(facts: Mapping[str, Fact]) -> dict[str, Any]:
    return {name: fact.value for name, fact in facts.items()}


def _compare(expected: Mapping[str, Any], found: Mapping[str, Fact], where: str) -> None:
    for name, value in expected.items():
        fact = found.get(name)
        if fact is not None and not _equal(name, fact.value, value):
            raise CheckpointError(
                f"{where}.{fact.name} is {quoted(fact.written)}, but config.json says {name} {quoted(value)}; "
                "give the config.json that belongs to the checkpoint"
            )


def _equal(name: str, found: Any, expected: Any) -> bool:
    if name == "attention_windows" and isinstance(found, tuple):
        # Bridge hands Hugging Face's number to mcore, which then sees one position more.
        one_less = tuple(window and window - 1 for window in found)
        return expected in (found, one_less)
    if isinstance(expected, tuple):
        same_length = isinstance(found, tuple | list) and len(found) == len(expected)
        return same_length and all(_equal(name, *pair) for pair in zip(found, expected, strict=True))
    if expected is None or isinstance(expected, bool):
        return bool(found) == bool(expected)
    if isinstance(expected, str):
        return isinstance(found, str) and found == expected
    try:
        return math.isclose(float(found), expected, rel_tol=1e-6)
    except (TypeError, ValueError, OverflowError):
        return False
