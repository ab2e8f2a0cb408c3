"""Reading which layers have a sliding window.

A query sees the keys less than `sliding_window` positions before it: so many, its own included
(`sliding_window_overlay` in transformers' masking_utils.py).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoints_conversion.architecture import Architecture
from checkpoints_conversion.families.values import read_size


def with_window_everywhere(arch: Architecture, config: dict[str, Any], path: Path, default: int | None) -> Architecture:
    """The architecture with `sliding_window`, if it is not null, in every layer.

    Args:
        arch: what all families read.
        config, path: the parsed config.json and where it came from.
        default: what transformers takes when the key is absent.
    """
    if config.get("sliding_window", default) is None:
        return arch
    return replace(arch, attention_windows=(read_size(config, "sliding_window", path, default),) * arch.num_layers)
