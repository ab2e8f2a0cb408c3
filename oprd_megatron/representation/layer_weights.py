"""How much each supervised layer counts in the loss, and how that changes over a run."""

from __future__ import annotations

from collections.abc import Sequence

from oprd_megatron.config.distill import DistillConfig, LayerWeights
from oprd_megatron.errors import ConfigError
from oprd_megatron.representation.layer_map import LayerPair


def layer_weights(config: DistillConfig, pairs: Sequence[LayerPair], progress: float = 0.0) -> dict[int, float]:
    """{student layer: weight}, 1 on average, so that the loss keeps its scale.

    Args:
        config: `layer_weights`, and `final_layer_weights` to move to.
        pairs: the supervised layers.
        progress: 0 at the first step, 1 at the last.

    Raises:
        ConfigError: a list of another length, weights that are all 0, or `score` without a measured map.
    """
    if not pairs:
        return {}
    first = _normalised("distill.layer_weights", config.layer_weights, pairs)
    last = first
    if config.final_layer_weights is not None:
        last = _normalised("distill.final_layer_weights", config.final_layer_weights, pairs)
    return {
        pair.student_layer: (1 - progress) * start + progress * end
        for pair, start, end in zip(pairs, first, last, strict=True)
    }


def _normalised(key: str, chosen: LayerWeights, pairs: Sequence[LayerPair]) -> list[float]:
    weights = _raw(key, chosen, pairs)
    total = sum(weights)
    if total <= 0:
        raise ConfigError(f"{key}: all {len(weights)} weights are 0; give at least one that is above")
    return [weight * len(weights) / total for weight in weights]


def _raw(key: str, chosen: LayerWeights, pairs: Sequence[LayerPair]) -> list[float]:
    if isinstance(chosen, list):
        if len(chosen) != len(pairs):
            raise ConfigError(f"{key}: {len(chosen)} weights for {len(pairs)} supervised layers; give one for each")
        return list(chosen)
    if chosen == "score":
        scores = [pair.score for pair in pairs if pair.score is not None]
        if len(scores) != len(pairs):
            raise ConfigError(
                f"{key}: score needs a measured map; set distill.layer_map to a file of `oprd bridge map`"
            )
        return [max(0.0, score) for score in scores]
    return [float(pair.student_layer) if chosen == "depth" else 1.0 for pair in pairs]
