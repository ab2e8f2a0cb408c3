"""Watches a training whose teacher is in fp8: when a student comes so close that rounding is a good part of what is left of its
distance, it learns the rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from oprd_megatron.config import RunConfig
from oprd_megatron.errors import ConfigError
from oprd_megatron.parallel.precision import read_noise
from oprd_megatron.representation.layer_map import LayerPair

LIMIT = 0.1
"""Share of the student's distance that may be noise."""


def share_of_noise(noise: float, loss: float) -> float:
    """Length of the noise over the student's distance, from the two losses (squares)."""
    return math.sqrt(noise / loss) if loss > 0 else math.inf


class NoiseGate:
    """Compares each record's layers with the noise.

    Args:
        noise: {student layer: representation loss between the teacher in fp8 and in dtype}.
        teacher_layers: {student layer: teacher layer}.
    """

    def __init__(self, noise: Mapping[int, float], teacher_layers: Mapping[int, int]) -> None:
        self.noise, self.teacher_layers = noise, teacher_layers
        self._said: set[int] = set()

    def warnings(self, layers: Mapping[str, Sequence[Any]], step: int) -> list[str]:
        """One line for every layer whose noise is above the limit for the first time; `layers` is that part of a record."""
        found = []
        for layer, loss in zip(layers["student"], layers["loss"], strict=True):
            share = share_of_noise(self.noise[layer], loss)
            if share <= LIMIT or layer in self._said:
                continue
            self._said.add(layer)
            found.append(
                f"step {step}: student layer {layer}: rounding of teacher layer {self.teacher_layers[layer]} is {share:.2f} of "
                f"the student's distance, above {LIMIT:g}: keep more layers in dtype (precision.keep_worst, first_layers, "
                "keep_layers) or use precision.linear: dtype"
            )
        return found


def gate_from_file(config: RunConfig, pairs: Sequence[LayerPair]) -> NoiseGate:
    """The gate of a teacher whose `precision.noise` names a file.

    Raises:
        ConfigError: it was measured for another teacher, or in another space, or on other layers.
    """
    precision = config.teacher.precision
    found, layers = read_noise(precision), {pair.student_layer: pair.teacher_layer for pair in pairs}
    about = described(config)
    differing = next((key for key, value in about.items() if found.get(key) != value), None)
    measured = dict(zip(found["layers"]["student"], found["layers"]["teacher"], strict=True))
    if differing is None and measured != layers:
        differing = "layers"
    if differing is not None:
        raise ConfigError(
            f"teacher.precision.noise: {precision.noise_file}: was measured with another {differing}; measure again with "
            "`oprd doctor --precision --out PATH`"
        )
    return NoiseGate(dict(zip(found["layers"]["student"], found["layers"]["loss"], strict=True)), layers)


def described(config: RunConfig) -> dict[str, str]:
    """What a measurement depends on, as it stands in its file."""
    distill = config.distill
    return {
        "teacher": str(config.teacher.path),
        "linear": config.teacher.precision.linear,
        "recipe": config.teacher.precision.recipe,
        "space": distill.space,
        "bridge": str(distill.bridge),
        "normalization": distill.normalization,
    }
