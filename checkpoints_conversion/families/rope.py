"""Rotary settings of a Hugging Face config, old spelling or new.

transformers 5 writes one `rope_parameters` object with `rope_theta` and `rope_type` in it; before, `rope_theta` and
`partial_rotary_factor` stood at the top level and `rope_scaling` held the rest (null for plain rope, `type` for
`rope_type`). Nothing is defaulted: a wrong base leaves a round trip bitwise equal and the logits wrong.

Which types a family may have, and whether it may rotate only a part of each head, the family says.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints_conversion.architecture import LinearRope, Llama3Rope, LongRope
from checkpoints_conversion.families.values import read_number, read_numbers, read_size
from checkpoints_conversion.files.messages import quoted, shown
from oprd_megatron.errors import CheckpointError

ROPE_KEYS = frozenset({"rope_parameters", "rope_scaling", "rope_theta"})
"""Top-level keys that `read_rope` understands."""

Scaling = Llama3Rope | LongRope | LinearRope | None

_COMMON_FIELDS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_FIELDS_OF_TYPE = {
    "default": _COMMON_FIELDS,
    "linear": _COMMON_FIELDS | {"factor"},
    "llama3": _COMMON_FIELDS | {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "longrope": _COMMON_FIELDS
    | {"factor", "short_factor", "long_factor", "original_max_position_embeddings", "attention_factor"},
}
_OLD_TYPES = {"su": "longrope"}
"""Names of before: Phi-3's first name for longrope."""


@dataclass(frozen=True)
class Rope:
    """The rotary fields of an `Architecture`, by their names there."""

    rotary_base: float
    rope_scaling: Scaling = None
    rotary_fraction: float = 1.0
    local_rotary_base: float | None = None


def read_rope(
    config: dict[str, Any],
    path: Path,
    *,
    types: Collection[str] = ("default", "linear", "llama3"),
    may_be_partial: bool = False,
    default_original_length: int | None = None,
) -> Rope:
    """Rotary base, scaling, and the part of each head that is rotated.

    Args:
        config: the parsed config.json.
        path: where it came from, for messages.
        types: rope types that the family has.
        may_be_partial: whether the family may rotate a part of each head.
        default_original_length: what transformers takes for a longrope's `original_max_position_embeddings` if the top
            level has none.

    Raises:
        CheckpointError: no or two different bases, a rope type that the family does not have, or an unknown field.
    """
    where, rope = _rope_object(config, path)
    rope_type = _rope_type(rope, where, types, path)
    fractions = _given(config, where, rope, "partial_rotary_factor", path)
    fraction = fractions.pop() if fractions else 1.0
    if fraction > 1 or (fraction != 1 and not may_be_partial):
        raise CheckpointError(f"{path}: partial_rotary_factor is {fraction}; only 1.0 is supported for this model")
    bases = _given(config, where, rope, "rope_theta", path)
    if not bases:
        raise CheckpointError(
            f"{path}: no rope_theta; add the base the model was trained with (10000.0 for Llama 1 and 2)"
        )
    if rope_type == "longrope":
        scaling: Scaling = _long_rope(config, where, rope, default_original_length, path)
    else:
        scaling = _plain_scaling(rope_type, where, rope, path)
    return Rope(bases.pop(), scaling, fraction)


def read_two_ropes(config: dict[str, Any], path: Path) -> Rope:
    """Gemma 3's: one for the layers that see everything, and a plain one for the layers with a window.

    transformers 5 nests both under `rope_parameters`, by layer type. Before, the second was `rope_local_base_freq`.

    Raises:
        CheckpointError: as `read_rope`, or the second is not plain.
    """
    nested = config.get("rope_parameters")
    if nested is None:
        nested = {"full_attention": config.get("rope_scaling"), "sliding_attention": None}
    if not isinstance(nested, dict) or set(nested) != {"full_attention", "sliding_attention"}:
        raise CheckpointError(
            f"{path}: rope_parameters must have full_attention and sliding_attention, and nothing else"
        )
    if config.get("rope_scaling") not in (None, nested["full_attention"]):
        raise CheckpointError(f"{path}: rope_parameters and rope_scaling disagree; keep the right one")
    found = []
    for kind, base, types in (
        ("full_attention", "rope_theta", ("default", "linear")),
        ("sliding_attention", "rope_local_base_freq", ("default",)),
    ):
        rope = {"rope_parameters": nested[kind], "rope_theta": config.get(base)}
        try:
            found.append(read_rope(rope, path, types=types))
        except CheckpointError as error:
            raise CheckpointError(f"{error} (the rope of {kind}, whose rope_theta may stand in {base})") from None
    everywhere, local = found
    return Rope(everywhere.rotary_base, everywhere.rope_scaling, local_rotary_base=local.rotary_base)


def _rope_object(config: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """The key that holds the rope object, and the object; plain rope if there is none."""
    given = {key: config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, dict):
            raise CheckpointError(f"{path}: {key} must be an object, not {quoted(value)}")
    if len(given) == 2 and given["rope_parameters"] != given["rope_scaling"]:
        raise CheckpointError(f"{path}: rope_parameters and rope_scaling disagree; keep the right one")
    return next(iter(given.items()), ("rope_parameters", {}))


def _rope_type(rope: dict[str, Any], where: str, types: Collection[str], path: Path) -> str:
    name = rope.get("rope_type", rope.get("type", "default"))
    rope_type = _OLD_TYPES.get(name, name) if isinstance(name, str) else name
    if rope_type not in tuple(types):
        *others, last = types
        supported = f"{', '.join(others)} and {last} are" if others else f"{last} is"
        raise CheckpointError(f"{path}: {where}.rope_type {quoted(name)} is not supported; only {supported}")
    unknown = sorted(set(rope) - _FIELDS_OF_TYPE[rope_type])
    if unknown:
        raise CheckpointError(
            f"{path}: {where}.{shown(unknown[0])} is not understood for rope_type {rope_type!r}; not converted"
        )
    return str(rope_type)


def _given(config: dict[str, Any], where: str, rope: dict[str, Any], key: str, path: Path) -> set[float]:
    """The number at the top level or in the rope object; both places may have it if they agree."""
    numbers = {
        read_number(source, key, path, prefix)
        for prefix, source in (("", config), (where, rope))
        if source.get(key) is not None
    }
    if len(numbers) > 1:
        raise CheckpointError(f"{path}: {key} and {where}.{key} disagree {sorted(numbers)}; keep the right one")
    return numbers


def _plain_scaling(rope_type: str, where: str, rope: dict[str, Any], path: Path) -> Llama3Rope | LinearRope | None:
    if rope_type == "default":
        return None
    if rope_type == "linear":
        return LinearRope(read_number(rope, "factor", path, where))
    scaling = Llama3Rope(
        factor=read_number(rope, "factor", path, where),
        low_freq_factor=read_number(rope, "low_freq_factor", path, where),
        high_freq_factor=read_number(rope, "high_freq_factor", path, where),
        original_max_position_embeddings=read_size(rope, "original_max_position_embeddings", path),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise CheckpointError(f"{path}: {where}.high_freq_factor must be greater than low_freq_factor")
    return scaling


def _long_rope(
    config: dict[str, Any], where: str, rope: dict[str, Any], default_length: int | None, path: Path
) -> LongRope:
    """transformers takes the original length from the top level, and the attention factor, if it is not given, is
    sqrt(1 + ln(factor) / ln(original length)) with the factor given or max_position_embeddings / original length."""
    key = "original_max_position_embeddings"
    original = read_size(config, key, path, default_length)
    if rope.get(key) is not None and read_size(rope, key, path) != original:
        raise CheckpointError(
            f"{path}: {where}.{key} is {rope[key]}, but transformers takes the top level's, {original}; "
            "write the right one at the top level"
        )
    if original < 2:
        raise CheckpointError(f"{path}: {key} must be at least 2, not {original}")
    factor = read_size(config, "max_position_embeddings", path) / original
    if rope.get("factor") is not None:
        factor = read_number(rope, "factor", path, where)
    attention_factor = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(original))
    if rope.get("attention_factor") is not None:
        attention_factor = read_number(rope, "attention_factor", path, where)
    return LongRope(
        short_factors=read_numbers(rope, "short_factor", path, where),
        long_factors=read_numbers(rope, "long_factor", path, where),
        original_max_position_embeddings=original,
        attention_factor=attention_factor,
    )
