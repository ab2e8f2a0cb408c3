"""Sliding windows of an architecture in mcore's settings."""

from __future__ import annotations

from typing import Any

from checkpoints_conversion.architecture import Architecture


def full_attention_period(arch: Architecture) -> int | None:
    """N if each N-th layer, and no other, sees all positions; None if there is no such N."""
    full = [index + 1 for index, window in enumerate(arch.attention_windows) if window is None]
    if not full:
        return None
    return full[0] if full == list(range(full[0], arch.num_layers + 1, full[0])) else None


def window_settings(arch: Architecture) -> dict[str, Any]:
    """mcore counts the keys before the query; Hugging Face, and `attention_windows`, the query too."""
    sizes = {window for window in arch.attention_windows if window is not None}
    if not sizes:
        return {"window_size": None, "window_attn_skip_freq": None}
    has_window = [int(window is not None) for window in arch.attention_windows]
    return {
        "window_size": [max(sizes) - 1, 0],
        "window_attn_skip_freq": None if all(has_window) else has_window,
    }
