"""Typed reading of config.json: a value of the right kind, or one line that names the file and the key."""

import math
from pathlib import Path
from typing import Any

from oprd_megatron.errors import CheckpointError


def read_size(config: dict[str, Any], key: str, path: Path, default: int | None = None) -> int:
    """A positive whole number; `default` if the key is absent or null and a default is given."""
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise CheckpointError(f"{path}: {key} must be a positive whole number, not {value!r}")
    return value


def read_number(config: dict[str, Any], key: str, path: Path, where: str = "") -> float:
    """A positive finite number; `where` is the object that holds the key, for the message."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        name = f"{where}.{key}" if where else key
        raise CheckpointError(f"{path}: {name} must be a positive number, not {value!r}")
    return float(value)


def read_flag(config: dict[str, Any], key: str, path: Path, default: bool = False) -> bool:
    """A boolean; `default` if the key is absent."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{path}: {key} must be true or false, not {value!r}")
    return value
