"""Rotary settings of a Hugging Face config, old spelling or new.

transformers 5 writes one `rope_parameters` object with `rope_theta` and `rope_type` in it; before, `rope_theta` stood
at the top level and `rope_scaling` held the rest (null for plain rope, `type` for `rope_type`). Nothing is defaulted: a
wrong base leaves a round trip bitwise equal and the logits wrong.
"""

from pathlib import Path
from typing import Any

from checkpoints_conversion.architecture import Llama3Rope
from checkpoints_conversion.families.values import read_number, read_size
from oprd_megatron.errors import CheckpointError

ROPE_KEYS = frozenset({"rope_parameters", "rope_scaling", "rope_theta"})
"""Top-level keys that `read_rope` understands."""

_COMMON_FIELDS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_FIELDS_OF_TYPE = {
    "default": _COMMON_FIELDS,
    "llama3": _COMMON_FIELDS | {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def read_rope(config: dict[str, Any], path: Path) -> tuple[float, Llama3Rope | None]:
    """Rotary base and scaling.

    Args:
        config: the parsed config.json.
        path: where it came from, for messages.

    Raises:
        CheckpointError: no or two different bases, a rope type other than default and llama3, or an unknown field.
    """
    where, rope = _rope_object(config, path)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in tuple(_FIELDS_OF_TYPE):
        raise CheckpointError(f"{path}: {where}.rope_type {rope_type!r} is not supported; only default and llama3 are")
    unknown = sorted(set(rope) - _FIELDS_OF_TYPE[rope_type])
    if unknown:
        raise CheckpointError(
            f"{path}: {where}.{unknown[0]} is not understood for rope_type {rope_type!r}; not converted"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{path}: {where}.partial_rotary_factor must be 1, not {rope['partial_rotary_factor']}")

    base = _rotary_base(config, where, rope, path)
    if rope_type == "default":
        return base, None
    scaling = Llama3Rope(
        factor=read_number(rope, "factor", path, where),
        low_freq_factor=read_number(rope, "low_freq_factor", path, where),
        high_freq_factor=read_number(rope, "high_freq_factor", path, where),
        original_max_position_embeddings=read_size(rope, "original_max_position_embeddings", path),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise CheckpointError(f"{path}: {where}.high_freq_factor must be greater than low_freq_factor")
    return base, scaling


def _rope_object(config: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """The key that holds the rope object, and the object; plain rope if there is none."""
    given = {key: config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, dict):
            raise CheckpointError(f"{path}: {key} must be an object, not {value!r}")
    if len(given) == 2 and given["rope_parameters"] != given["rope_scaling"]:
        raise CheckpointError(f"{path}: rope_parameters and rope_scaling disagree; keep the right one")
    return next(iter(given.items()), ("rope_parameters", {}))


def _rotary_base(config: dict[str, Any], where: str, rope: dict[str, Any], path: Path) -> float:
    bases = {
        read_number(source, "rope_theta", path, prefix)
        for prefix, source in (("", config), (where, rope))
        if source.get("rope_theta") is not None
    }
    if len(bases) > 1:
        raise CheckpointError(f"{path}: rope_theta and {where}.rope_theta disagree {sorted(bases)}; keep the right one")
    if not bases:
        raise CheckpointError(
            f"{path}: no rope_theta; add the base the model was trained with (10000.0 for Llama 1 and 2)"
        )
    return bases.pop()
