"""What a path holds: a Hugging Face model in one of its formats, or a Megatron checkpoint."""

from __future__ import annotations

from pathlib import Path

from checkpoints_conversion.interop import TRACKER
from checkpoints_conversion.interop.locate import FORMAT_FILE, NESTED

_HUGGING_FACE = ("config.json", "*.gguf", "*.safetensors", "*.bin")
_MEGATRON = (FORMAT_FILE, TRACKER, ".metadata", "release", "iter_*", "mp_rank_*", "*.distcp", *NESTED)


def is_megatron(path: Path) -> bool:
    """Whether a directory is, or holds, a Megatron checkpoint rather than a Hugging Face model."""
    if not path.is_dir() or any(any(path.glob(pattern)) for pattern in _HUGGING_FACE):
        return False
    return any(any(path.glob(pattern)) for pattern in _MEGATRON)
