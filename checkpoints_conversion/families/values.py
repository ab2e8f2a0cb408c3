"""Typed reading of config.json: a value of the right kind, or one line that names the file and the key."""

from pathlib import Path
from typing import Any

from checkpoints_conversion.files.messages import quoted
from oprd_megatron.errors import CheckpointError

MAX_SIZE = 2**31
"""No dimension of a model reaches this."""
MAX_NUMBER = 1e30
"""Nor any other number in a config; this also keeps out infinity, and whole numbers that no float can hold."""
MAX_PARTS = 10_000
"""Nor does the number of layers or experts: tables have a row for each."""


def read_size(config: dict[str, Any], key: str, path: Path, default: int | None = None) -> int:
    """A positive whole number; `default` if the key is absent or null and a default is given."""
    value = config.get(key)
    if value is None:
        value = default
    limit = MAX_PARTS if "layers" in key or "experts" in key else MAX_SIZE
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < limit:
        raise CheckpointError(f"{path}: {key} must be a positive whole number below {limit}, not {quoted(value)}")
    return value


def read_number(config: dict[str, Any], key: str, path: Path, where: str = "") -> float:
    """A positive number below `MAX_NUMBER`; `where` is the object that holds the key, for the message."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MAX_NUMBER:
        name = f"{where}.{key}" if where else key
        raise CheckpointError(f"{path}: {name} must be a positive number, not {quoted(value)}")
    return float(value)


def read_numbers(config: dict[str, Any], key: str, path: Path, where: str) -> tuple[float, ...]:
    """A list of positive finite numbers."""
    values = config.get(key)
    if not isinstance(values, list):
        raise CheckpointError(f"{path}: {where}.{key} must be a list of numbers, not {quoted(values)}")
    return tuple(read_number({key: value}, key, path, where) for value in values)


def read_flag(config: dict[str, Any], key: str, path: Path, default: bool = False) -> bool:
    """A boolean; `default` if the key is absent."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{path}: {key} must be true or false, not {quoted(value)}")
    return value
