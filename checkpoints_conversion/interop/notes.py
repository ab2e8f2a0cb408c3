"""What a user of a converted directory should know: flags that Megatron-LM must be given again, and what a package cannot say.

Loading a model with a package that cannot say one of its features gives other numbers than Hugging Face, without an error.
"""

from __future__ import annotations

from checkpoints_conversion.architecture import Architecture, LinearRope, Llama3Rope, LongRope
from checkpoints_conversion.interop.windows import full_attention_period, window_settings

MEGATRON_ROPE = (1.0, 4.0, 8192)
"""Low and high frequency factor and original length that mcore has built in for llama3 scaling; only `factor` is free."""
MEGATRON_LM_ROPE_FACTOR = 8.0
"""mcore's default, which Megatron-LM's gpt_builders.py uses whatever `--rope-scaling-factor` says."""


def notes_for(arch: Architecture, dtype: str) -> list[str]:
    """What a user of the directory should know, a line each: the flags to add, and what cannot be said at all."""
    notes = [f"Megatron-LM: with --use-checkpoint-args add {' '.join(_flags(arch, dtype))}; it does not read these"]
    notes += [
        f"Megatron-LM would compute something else, because it has no {what}" for what in lacking_in_megatron_lm(arch)
    ]
    notes += [
        f"Megatron-Bridge would compute something else, because it has no {what}" for what in lacking_in_bridge(arch)
    ]
    return notes


def _flags(arch: Architecture, dtype: str) -> list[str]:
    flags = [f"--norm-epsilon {arch.norm_epsilon}", "--tokenizer-model <the hf directory>"]
    if dtype in ("BF16", "F16"):
        flags.append("--bf16" if dtype == "BF16" else "--fp16")
    if arch.qk_norm:
        flags.append("--qk-layernorm")
    if isinstance(arch.rope_scaling, Llama3Rope):
        flags.append(f"--use-rope-scaling --rope-scaling-factor {arch.rope_scaling.factor}")
    windows = window_settings(arch)
    if windows["window_size"]:
        flags.append("--window-size {},{}".format(*windows["window_size"]))
    if windows["window_attn_skip_freq"]:
        flags.append(f'--window-attn-skip-freq "{windows["window_attn_skip_freq"]}"')
    return flags


def lacking_in_bridge(arch: Architecture) -> list[str]:
    """What mcore's GPT model, or for Gemma 3 Bridge's, cannot compute."""
    rope, found = arch.rope_scaling, []
    if isinstance(rope, LongRope):
        found.append("longrope")
    if isinstance(rope, Llama3Rope):
        constants = (rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position_embeddings)
        if constants != MEGATRON_ROPE:
            found.append(f"llama3 rope with {constants}, only with {MEGATRON_ROPE}")
    if len({window for window in arch.attention_windows if window is not None}) > 1:
        found.append("windows of several sizes")
    if arch.sandwich_norm and None in arch.attention_windows and full_attention_period(arch) is None:
        found.append("layers without window that do not stand at regular places")
    if arch.experts and arch.experts.top_k == 1 and arch.experts.normalised:
        found.append("routing to one expert with weight 1")
    return found


def lacking_in_megatron_lm(arch: Architecture) -> list[str]:
    """What Megatron-LM's GPT builder cannot compute."""
    rope, found = arch.rope_scaling, lacking_in_bridge(arch)
    if isinstance(rope, Llama3Rope) and rope.factor != MEGATRON_LM_ROPE_FACTOR:
        found.append(f"llama3 rope of factor {rope.factor}: gpt_builders.py drops --rope-scaling-factor for 8")
    if isinstance(rope, LinearRope):
        found.append("linear rope scaling: gpt_builders.py does not pass it on")
    if arch.sandwich_norm:
        found.append("norms after attention and MLP")
    if arch.activation != "silu":
        found.append(f"gate with {arch.activation}")
    if arch.embedding_scale != 1.0:
        found.append("factor on embeddings")
    if arch.local_rotary_base is not None:
        found.append("second rotary base")
    return found
