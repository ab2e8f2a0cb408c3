"""A GGUF file's settings as a Hugging Face config.json. What is not understood is refused by name, as in config.json.

Settings are named `<architecture>.<what>`. Numbers are fp32 there; the shortest decimal that rounds to the same fp32 is what
the model's own config had (1e-05, not 9.99999974e-06).

What GGUF does not say, and where it comes from here:
    Llama 3.1's stretched rotary frequencies   a tensor of their factors, `rope_freqs.weight`, recognised
    Gemma 3's layer types                      five with a window, then one without (llama.cpp, transformers)
    Gemma 3's attention scale                  head_dim ** -0.5, in the 27B the width of a head before ** -0.5 (llama.cpp)
    Mistral 7B v0.1's window of 4096           nowhere: a Mistral is a Llama here, which it is from v0.2 on
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from checkpoints_conversion.families.values import read_number, read_size
from checkpoints_conversion.files.dtypes import TORCH_NAMES
from checkpoints_conversion.files.messages import quoted, shown
from checkpoints_conversion.formats.gguf_model import GGUFModel
from oprd_megatron.errors import CheckpointError

_SIZES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""GGUF -> config.json, for every architecture."""
_ELSEWHERE = frozenset(
    {"vocab_size", "rope.freq_base", "rope.dimension_count", "attention.key_length", "attention.value_length"}
)
"""Read for every architecture, by name."""
_HARMLESS = frozenset({"tensor_data_layout"})
_TOKEN_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
_GEMMA3_27B_LAYERS = 62
_GEMMA3_LOCAL_BASE = 10000.0
_GEMMA3_PERIOD = 6
_LLAMA3_ORIGINAL, _LLAMA3_LOW, _LLAMA3_HIGH = 8192, 1.0, 4.0


class Settings:
    """The settings of one file, with the architecture's prefix left out, and which of them were read."""

    def __init__(self, model: GGUFModel) -> None:
        self.model = model
        self.architecture = model.settings.get("general.architecture")
        prefix = f"{self.architecture}."
        self._own = {key.removeprefix(prefix): value for key, value in model.settings.items() if key.startswith(prefix)}

    def __contains__(self, key: str) -> bool:
        return key in self._own

    def keys(self) -> Collection[str]:
        return self._own.keys()

    def number(self, key: str) -> Any:
        """A finite number, an fp32 one as its shortest decimal; None if it is absent."""
        value = self._own.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refusal(key)
        return value if isinstance(value, int) else float(str(np.float32(value)))

    def size(self, key: str) -> int | None:
        """A positive whole number; None if it is absent."""
        return read_size(self._own, key, self.model.path) if key in self._own else None

    def text(self, key: str) -> str | None:
        """A string; None if it is absent or something else."""
        value = self._own.get(key)
        return value if isinstance(value, str) else None

    def refusal(self, key: str, supported: str = "") -> CheckpointError:
        """What to raise for a setting with a value that is not implemented."""
        told = f"; only {supported} is supported" if supported else ", which is not understood"
        return CheckpointError(
            f"{self.model.path}: {shown(str(self.architecture))}.{key} is {quoted(self._own.get(key))}{told}"
        )


@dataclass(frozen=True)
class _Architecture:
    """One GGUF architecture."""

    model_type: str
    hf_class: str
    extend: Callable[[dict[str, Any], Settings], None]
    """Puts what only this architecture has into the config."""
    keys: frozenset[str] = frozenset()
    """Settings that `extend` reads."""


def gguf_config(model: GGUFModel) -> dict[str, Any]:
    """The config.json of a model.

    Raises:
        CheckpointError: an architecture, a setting or a tensor of factors that is not understood.
    """
    settings = Settings(model)
    known = _ARCHITECTURES.get(str(settings.architecture))
    if known is None:
        raise CheckpointError(
            f"{model.path}: architecture {quoted(settings.architecture)} is not supported in GGUF files; supported: "
            f"{', '.join(_ARCHITECTURES)}"
        )
    foreign = sorted(settings.keys() - _SIZES.keys() - _ELSEWHERE - _HARMLESS - known.keys)
    if foreign:
        raise settings.refusal(shown(foreign[0]))
    if "token_embd.weight" not in model.tensors:
        raise CheckpointError(f"{model.path}: has no token_embd.weight; give a whole model")
    config = {
        "architectures": [known.hf_class],
        "model_type": known.model_type,
        **{ours: settings.number(theirs) for theirs, ours in _SIZES.items() if theirs in settings},
        "vocab_size": model.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in model.tensors,
        "dtype": TORCH_NAMES[model.tensors["token_embd.weight"].dtype],
    }
    for theirs, ours in _TOKEN_IDS.items():
        token_id = model.settings.get(f"tokenizer.ggml.{theirs}")
        if isinstance(token_id, int):
            config[ours] = token_id
    config["head_dim"] = _head_dim(settings)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": _rope_theta(settings)}
    known.extend(config, settings)
    return config


def _head_dim(settings: Settings) -> int:
    """Width of a head; whatever says it must say the same."""
    key, value = settings.size("attention.key_length"), settings.size("attention.value_length")
    if key is not None and value not in (None, key):
        raise settings.refusal("attention.value_length", "what attention.key_length is")
    if key is not None:
        return key
    width, heads = settings.size("embedding_length"), settings.size("attention.head_count")
    if width is None or heads is None or width % heads:
        raise settings.refusal("attention.head_count", "a divisor of embedding_length")
    return width // heads


def _rope_theta(settings: Settings) -> float:
    """Only Llama files from before it was written down may lack it; llama.cpp takes 10000 for them."""
    base = settings.number("rope.freq_base")
    if base is None and settings.architecture == "llama":
        return 10000.0
    return read_number({"rope.freq_base": base}, "rope.freq_base", settings.model.path)


def _whole_heads(config: dict[str, Any], settings: Settings) -> None:
    """Refuse partial rotation and stretched frequencies."""
    rotated = settings.number("rope.dimension_count")
    if rotated not in (None, config["head_dim"]):
        raise settings.refusal("rope.dimension_count", "the width of a head")
    for name in settings.model.tensors:
        if name.startswith("rope_f"):
            raise CheckpointError(
                f"{settings.model.path}: {shown(name)} stretches the rotary frequencies, which GGUF does not describe; "
                "convert the safetensors of this model instead"
            )


def _llama(config: dict[str, Any], settings: Settings) -> None:
    """Llama 3.1 and later: the factors of the rotary frequencies are a tensor."""
    if "rope_freqs.weight" not in settings.model.tensors:
        _whole_heads(config, settings)
        return
    if settings.number("rope.dimension_count") not in (None, config["head_dim"]):
        raise settings.refusal("rope.dimension_count", "the width of a head")
    rope = config["rope_parameters"]
    found = _factors(settings, "rope_freqs.weight", config["head_dim"])
    stretch = max(found or [1.0])
    expected = llama3_factors(rope["rope_theta"], config["head_dim"], stretch) if 1 < stretch < 1000 else None
    if expected is None or not np.allclose(np.array(found), expected, rtol=1e-5):
        raise CheckpointError(
            f"{settings.model.path}: rope_freqs.weight holds other factors than Llama 3's; convert the safetensors instead"
        )
    config["rope_parameters"] = {
        **rope,
        "rope_type": "llama3",
        "factor": stretch,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL,
    }


def llama3_factors(base: float, head_dim: int, factor: float) -> np.ndarray:
    """By what Llama 3.1 divides each rotary frequency [head_dim / 2], as llama.cpp's converter writes it."""
    frequencies = 1.0 / base ** (np.arange(0, head_dim, 2) / head_dim)
    turns = _LLAMA3_ORIGINAL * frequencies / (2 * np.pi)
    """Turns within the original context; few: stretched, many: not."""
    smooth = np.clip((turns - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _phi3(config: dict[str, Any], settings: Settings) -> None:
    """The 128k models have two tensors of factors (longrope)."""
    rope = config["rope_parameters"]
    rotated = settings.size("rope.dimension_count") or config["head_dim"]
    rope["partial_rotary_factor"] = rotated / config["head_dim"]
    config["sliding_window"] = settings.number("attention.sliding_window") or None
    context, original = settings.size("context_length"), settings.size("rope.scaling.original_context_length")
    factors = {kind: _factors(settings, f"rope_factors_{kind}.weight", rotated) for kind in ("short", "long")}
    if factors["short"] is None and factors["long"] is None:
        if original not in (None, context):
            raise settings.refusal("rope.scaling.original_context_length", "context_length")
        return
    if factors["short"] is None or factors["long"] is None or original is None or context is None:
        raise CheckpointError(f"{settings.model.path}: only a part of what longrope needs is there; download it again")
    rope |= {"rope_type": "longrope", "short_factor": factors["short"], "long_factor": factors["long"]}
    config["original_max_position_embeddings"] = original
    given = settings.number("rope.scaling.attn_factor")
    stretch = context / original
    usual = math.sqrt(1 + math.log(max(stretch, 1.0)) / math.log(max(original, 2)))
    if given is not None and not math.isclose(given, usual, rel_tol=1e-5):
        raise settings.refusal("rope.scaling.attn_factor", f"{usual:.6g}")


def _factors(settings: Settings, name: str, rotated: int) -> list[float] | None:
    """A tensor of one factor a rotated frequency, or None."""
    info = settings.model.tensors.get(name)
    if info is None:
        return None
    if info.kind != "F32" or info.shape != (rotated // 2,):
        raise CheckpointError(
            f"{settings.model.path}: {name} does not have {rotated // 2} fp32 numbers; download it again"
        )
    (row,) = settings.model.rows(name, 0, 1)
    return [float(str(number)) for number in row.view(np.float32)[0]]


def _gemma3(config: dict[str, Any], settings: Settings) -> None:
    _whole_heads(config, settings)
    if settings.number("attention.sliding_window_pattern") not in (None, _GEMMA3_PERIOD):
        raise settings.refusal("attention.sliding_window_pattern", str(_GEMMA3_PERIOD))
    width, heads = settings.size("embedding_length"), settings.size("attention.head_count")
    local = settings.number("rope.freq_base_swa")
    everywhere = config["rope_parameters"]
    if "rope.scaling.type" in settings or "rope.scaling.factor" in settings:
        if settings.text("rope.scaling.type") != "linear":
            raise settings.refusal("rope.scaling.type", "linear")
        everywhere = {**everywhere, "rope_type": "linear", "factor": settings.number("rope.scaling.factor")}
    config |= {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": settings.number("attention.sliding_window"),
        "sliding_window_pattern": _GEMMA3_PERIOD,
        "query_pre_attn_scalar": config["head_dim"],
        "rope_parameters": {
            "full_attention": everywhere,
            "sliding_attention": {"rope_type": "default", "rope_theta": float(local or _GEMMA3_LOCAL_BASE)},
        },
    }
    if settings.size("block_count") == _GEMMA3_27B_LAYERS and width and heads:
        config["query_pre_attn_scalar"] = width // heads


_PHI3_KEYS = frozenset({"attention.sliding_window", "rope.scaling.original_context_length", "rope.scaling.attn_factor"})
_GEMMA3_KEYS = frozenset(
    {
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "rope.freq_base_swa",
        "rope.scaling.type",
        "rope.scaling.factor",
    }
)
_ARCHITECTURES = {
    "llama": _Architecture("llama", "LlamaForCausalLM", _llama),
    "qwen2": _Architecture("qwen2", "Qwen2ForCausalLM", _whole_heads),
    "qwen3": _Architecture("qwen3", "Qwen3ForCausalLM", _whole_heads),
    "phi3": _Architecture("phi3", "Phi3ForCausalLM", _phi3, _PHI3_KEYS),
    "gemma3": _Architecture("gemma3_text", "Gemma3ForCausalLM", _gemma3, _GEMMA3_KEYS),
}
