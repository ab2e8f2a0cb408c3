"""Which student layers are supervised, and by which teacher layers. Layers are 1-based global ids everywhere.

OPRD Eq. 11: phi(l) = round((l - 1) / (L_S - 1) * (L_T - 1)) + 1: first to first, last to last.
"""

from __future__ import annotations

from dataclasses import dataclass

from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.errors import ConfigError


@dataclass(frozen=True)
class LayerPair:
    """One supervised student layer and the teacher layer that supervises it (1-based)."""

    student_layer: int
    teacher_layer: int


def proportional_layer(student_layer: int, num_student_layers: int, num_teacher_layers: int) -> int:
    """phi of Eq. 11. Exact halves go to the even neighbour (Python's and IEEE 754's rule), in integer arithmetic: a
    floating-point quotient could put 2.5 on either side. A student of one layer is taught by the teacher's last."""
    if num_student_layers == 1:
        return num_teacher_layers
    numerator, denominator = (student_layer - 1) * (num_teacher_layers - 1), num_student_layers - 1
    quotient, remainder = divmod(numerator, denominator)
    if 2 * remainder > denominator or (2 * remainder == denominator and quotient % 2 == 1):
        quotient += 1
    return quotient + 1


def layer_set(layers: str | list[int], num_layers: int) -> list[int]:
    """Student layers under a name or from a list, ascending.

    `even` is 1, 3, 5, .. and `odd` is 2, 4, 6, ..: the authors count from 0, and the words mean what theirs mean.

    Raises:
        ConfigError: a layer that is not there or is named twice, or an empty set.
    """
    named = {"all": range(1, num_layers + 1), "last": [num_layers], "even": range(1, num_layers + 1, 2)}
    named["odd"] = range(2, num_layers + 1, 2)
    chosen = list(named[layers]) if isinstance(layers, str) else sorted(layers)
    for layer in chosen:
        _check_layer("distill.layers", layer, num_layers, "student")
    if len(set(chosen)) != len(chosen):
        raise ConfigError(f"distill.layers: {chosen} names a layer twice")
    if not chosen:
        raise ConfigError(f"distill.layers: {layers!r} selects none of the student's {num_layers} layers")
    return chosen


def resolve_layer_pairs(config: DistillConfig, num_student_layers: int, num_teacher_layers: int) -> list[LayerPair]:
    """The supervised pairs of a run, by ascending student layer.

    Raises:
        ConfigError: a layer out of range, or a supervised layer without a teacher layer.
    """
    if config.layer_map == "proportional":
        chosen = layer_set(config.layers, num_student_layers)
        mapped = {layer: proportional_layer(layer, num_student_layers, num_teacher_layers) for layer in chosen}
    else:
        mapped = dict(config.layer_map)
        for student_layer, teacher_layer in mapped.items():
            _check_layer("distill.layer_map", student_layer, num_student_layers, "student")
            _check_layer("distill.layer_map", teacher_layer, num_teacher_layers, "teacher")
        chosen = sorted(mapped) if config.layers == "all" else layer_set(config.layers, num_student_layers)
    for layer in chosen:
        if layer not in mapped:
            raise ConfigError(
                f"distill.layer_map: student layer {layer} is in distill.layers but has no teacher layer; add {layer}: N"
            )
    if not chosen:
        raise ConfigError("distill.layer_map: no pairs; give at least one {student: teacher} pair")
    return [LayerPair(layer, mapped[layer]) for layer in chosen]


def _check_layer(key: str, layer: int, num_layers: int, which: str) -> None:
    if not 1 <= layer <= num_layers:
        raise ConfigError(f"{key}: {which} layer {layer} is out of range; the {which} has layers 1 to {num_layers}")
