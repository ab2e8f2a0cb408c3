"""Which student layers are supervised, and by which teacher layers. Layers are 1-based global ids everywhere.

OPRD Eq. 11: phi(l) = round((l - 1) / (L_S - 1) * (L_T - 1)) + 1: first to first, last to last.

A measured map is a json file that `oprd bridge map` writes:
{"format": 1, "pairs": [{"student_layer", "teacher_layer", "score"}, ..], ..}; other keys are for people.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.errors import ConfigError

FORMAT = 1
"""Of a map file."""


@dataclass(frozen=True)
class LayerPair:
    """One supervised student layer and the teacher layer that supervises it (1-based); `score` says how alike a measured map
    found them."""

    student_layer: int
    teacher_layer: int
    score: float | None = field(default=None, compare=False)


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
    """The supervised pairs of a run, by ascending student layer; none with `mode: none`.

    Raises:
        ConfigError: a layer out of range, a supervised layer without a teacher layer, or a map file that cannot be read.
    """
    if config.space == "none":
        return []
    if config.layer_map == "proportional":
        chosen = layer_set(config.layers, num_student_layers)
        return [LayerPair(layer, proportional_layer(layer, num_student_layers, num_teacher_layers)) for layer in chosen]
    if isinstance(config.layer_map, Path):
        given = read_map(config.layer_map)
    else:
        given = [LayerPair(*pair) for pair in config.layer_map.items()]
    for pair in given:
        _check_layer("distill.layer_map", pair.student_layer, num_student_layers, "student")
        _check_layer("distill.layer_map", pair.teacher_layer, num_teacher_layers, "teacher")
    mapped = {pair.student_layer: pair for pair in given}
    chosen = sorted(mapped) if config.layers == "all" else layer_set(config.layers, num_student_layers)
    for layer in chosen:
        if layer not in mapped:
            raise ConfigError(
                f"distill.layer_map: student layer {layer} is in distill.layers but has no teacher layer; add {layer}: N"
            )
    if not chosen:
        raise ConfigError("distill.layer_map: no pairs; give at least one {student: teacher} pair")
    pairs = [mapped[layer] for layer in chosen]
    if config.monotone_map:
        refuse_crossing(pairs)
    return pairs


def read_map(path: Path) -> list[LayerPair]:
    """The pairs of a map file, as they are there.

    Raises:
        ConfigError: missing, or not such a file.
    """
    try:
        values = json.loads(path.read_text())
        pairs = [LayerPair(pair["student_layer"], pair["teacher_layer"], pair.get("score")) for pair in values["pairs"]]
        layers = [pair.student_layer for pair in pairs]
        scores = [pair.score for pair in pairs if pair.score is not None]
        if values["format"] != FORMAT or len(set(layers)) != len(layers):
            raise ValueError
        if any(type(layer) is not int for layer in [*layers, *(pair.teacher_layer for pair in pairs)]):
            raise TypeError
        if any(type(score) not in (int, float) or not math.isfinite(score) for score in scores):
            raise TypeError
    except OSError as error:
        raise ConfigError(
            f"distill.layer_map: {path}: {error.strerror}; give proportional, {{student: teacher}} pairs, or a file that "
            "`oprd bridge map` wrote"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise ConfigError(f"distill.layer_map: {path}: not a layer map; make it with `oprd bridge map`") from None
    return pairs


def refuse_crossing(pairs: Sequence[LayerPair]) -> None:
    """Raises:
    ConfigError: a deeper student layer is taught by a shallower teacher layer.
    """
    for before, after in pairwise(pairs):
        if after.teacher_layer < before.teacher_layer:
            raise ConfigError(
                f"distill.layer_map: is not monotone: student layer {before.student_layer} learns from teacher layer "
                f"{before.teacher_layer}, but layer {after.student_layer} from {after.teacher_layer}; mend it, or set "
                "distill.monotone_map: false"
            )


def _check_layer(key: str, layer: int, num_layers: int, which: str) -> None:
    if not 1 <= layer <= num_layers:
        raise ConfigError(f"{key}: {which} layer {layer} is out of range; the {which} has layers 1 to {num_layers}")
