"""Layer weights: a mean of 1 whatever is chosen, a straight line over the run, and mistakes that cost one line."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oprd_megatron.config.schema import DistillConfig, ParallelConfig
from oprd_megatron.errors import ConfigError
from oprd_megatron.representation.alignment import AlignmentReport
from oprd_megatron.representation.layer_map import LayerPair, resolve_layer_pairs
from oprd_megatron.representation.layer_weights import layer_weights
from tests.ranks import run_ranks
from tests.representation.test_gradients import LAYOUTS, build, samples
from tests.tiny_models import tiny_hf_model

PAIRS = [LayerPair(1, 1, 0.5), LayerPair(3, 4, -2.0), LayerPair(4, 5, 1.5)]


def weights(progress: float = 0.0, pairs: list[LayerPair] = PAIRS, **keys: Any) -> dict[int, float]:
    return layer_weights(DistillConfig(**keys), pairs, progress)


def test_by_name() -> None:
    """uniform: all 1; depth: as the layer's number; score: as the map rated the pair, a negative score as 0. Mean 1."""
    assert weights() == {1: 1.0, 3: 1.0, 4: 1.0}
    assert weights(layer_weights="depth") == pytest.approx({1: 3 / 8, 3: 9 / 8, 4: 12 / 8})
    assert weights(layer_weights="score") == pytest.approx({1: 0.75, 3: 0.0, 4: 2.25})
    assert weights(layer_weights=[3, 0, 1]) == pytest.approx({1: 9 / 4, 3: 0.0, 4: 3 / 4})


@given(
    st.lists(st.floats(1e-3, 1e3) | st.just(0.0), min_size=3, max_size=3).filter(any),
    st.lists(st.floats(1e-3, 1e3) | st.just(0.0), min_size=3, max_size=3).filter(any),
    st.floats(0, 1),
)
def test_the_mean_is_always_one(first: list[float], last: list[float], progress: float) -> None:
    """The loss keeps its scale whatever the weights, at every step of a schedule."""
    found = weights(progress, layer_weights=first, final_layer_weights=last)
    assert list(found) == [1, 3, 4] and all(weight >= 0 for weight in found.values())
    assert sum(found.values()) == pytest.approx(3.0)


def test_a_straight_line_in_steps() -> None:
    """From the first weights at the first step to the last ones at the last, equal strides between; without final weights
    nothing moves."""
    keys = {"layer_weights": [3, 0, 0], "final_layer_weights": [0, 0, 5]}
    path = [weights(step / 4, **keys) for step in range(5)]
    assert path[0] == {1: 3.0, 3: 0.0, 4: 0.0} and path[-1] == {1: 0.0, 3: 0.0, 4: 3.0}
    for before, after in pairwise(path):
        assert after[1] - before[1] == pytest.approx(-0.75) and after[4] - before[4] == pytest.approx(0.75)
    assert weights(1.0, layer_weights=[3, 0, 0]) == {1: 3.0, 3: 0.0, 4: 0.0}
    assert weights(0.5, final_layer_weights=[3, 0, 0]) == pytest.approx({1: 2.0, 3: 0.5, 4: 0.5})


UNRATED = [LayerPair(1, 1, 0.5), LayerPair(2, 2)]
REFUSED: dict[str, tuple[list[LayerPair], dict[str, Any], str]] = {
    "too short": (
        PAIRS,
        {"layer_weights": [1, 2]},
        "distill.layer_weights: 2 weights for 3 supervised layers; give one",
    ),
    "too long": (PAIRS, {"layer_weights": [1.0] * 4}, "distill.layer_weights: 4 weights for 3 supervised layers"),
    "empty": (PAIRS, {"layer_weights": []}, "distill.layer_weights: 0 weights for 3 supervised layers"),
    "nothing": (PAIRS, {"layer_weights": [0, 0, 0]}, "distill.layer_weights: all 3 weights are 0"),
    "nothing at the end": (
        PAIRS,
        {"final_layer_weights": [0, 0, 0]},
        "distill.final_layer_weights: all 3 weights are 0",
    ),
    "too short at the end": (PAIRS, {"final_layer_weights": [1]}, "distill.final_layer_weights: 1 weights for 3"),
    "no map": (UNRATED[1:], {"layer_weights": "score"}, "distill.layer_weights: score needs a measured map"),
    "half a map": (
        UNRATED,
        {"final_layer_weights": "score"},
        "distill.final_layer_weights: score needs a measured map",
    ),
    "all unlike": ([LayerPair(1, 1, -1.0)], {"layer_weights": "score"}, "all 1 weights are 0"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_refused_in_one_line(mistake: str) -> None:
    """The key, what is wrong with it, and the way out; also for the weights at the end of a run, at its beginning."""
    pairs, keys, says = REFUSED[mistake]
    with pytest.raises(ConfigError) as caught:
        weights(0.0, pairs, **keys)
    assert says in str(caught.value) and "\n" not in str(caught.value) and ";" in str(caught.value)


def test_scores_of_a_map_file(tmp_path: Path) -> None:
    """What `oprd bridge map` wrote down is what `score` weighs by, also for a part of its layers."""
    path = tmp_path / "map.json"
    rated = [
        {"student_layer": s, "teacher_layer": t, "score": score}
        for s, t, score in ((4, 5, 3.0), (1, 2, 1.0), (2, 2, 0.5))
    ]
    path.write_text(json.dumps({"format": 1, "pairs": rated}))
    for layers, expected in (("all", {1: 2 / 3, 2: 1 / 3, 4: 2.0}), ([1, 4], {1: 0.5, 4: 1.5})):
        config = DistillConfig(layer_map=path, layers=layers, layer_weights="score")  # type: ignore[arg-type]
        assert layer_weights(config, resolve_layer_pairs(config, 4, 5)) == pytest.approx(expected)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    for seed, (name, layers) in enumerate((("teacher", 5), ("student", 4)), 1):
        tiny_hf_model("llama", folder / name, num_layers=layers, std=0.1, seed=seed, vocab_size=300)
    return folder


def weighted(
    folder: Path, parallel: ParallelConfig, distills: list[DistillConfig]
) -> list[tuple[AlignmentReport, dict[str, torch.Tensor]]]:
    """(report, {name of a parameter, its layer counted globally: gradient} on this rank) of one batch for each config."""
    found = []
    for distill in distills:
        alignment = build(folder / "teacher", folder / "student", parallel, distill, 2)
        report = alignment.reduce(alignment.run(alignment.plan(samples()), train=True))
        gradients = {}
        for chunk in alignment.student.chunks:
            for block in chunk.decoder.layers:
                for name, parameter in block.named_parameters():
                    gradients[f"layer {block.layer_number} {name}"] = parameter.grad.clone()
            for layer, state_map in getattr(chunk, "state_maps", torch.nn.ModuleDict()).items():
                gradients[f"map {layer}"] = state_map.weight.grad.clone()
        found.append((report, gradients))
    return found


@pytest.mark.parametrize("layout", ["single", "tp2", "pp2"])
def test_a_layer_without_weight_teaches_nothing(models: Path, layout: str) -> None:
    """Only layer 2 counts: layers 3 and 4, and the other layers' maps, get a gradient of exactly 0; they are still measured.
    The loss is the weighted mean of what the layers measured."""
    parallel = LAYOUTS[layout]
    listed = {"layer_weights": [0, 1, 0, 0], "coefficient": 2.5, "positions": "all"}
    weighted_all = DistillConfig(layer_weights=[1, 2, 3, 4], coefficient=2.5, positions="all")
    configs = [DistillConfig(**listed), DistillConfig(**listed, mode="linear"), weighted_all]  # type: ignore[arg-type]
    for rank in run_ranks(parallel.tp * parallel.pp, weighted, models, parallel, configs):
        for report, gradients in rank[:2]:
            assert report.loss == pytest.approx(2.5 * report.layer_loss[1], rel=1e-12)
            assert all(loss > 0 for loss in report.layer_loss)
            for name, gradient in gradients.items():
                kind, layer = name.split()[:2]
                counts = layer == "2" if kind == "map" else layer in ("1", "2")
                assert bool(gradient.any()) == counts, name
        report, _ = rank[2]
        expected = 2.5 * sum(w * loss for w, loss in zip((0.4, 0.8, 1.2, 1.6), report.layer_loss, strict=True)) / 4
        assert report.loss == pytest.approx(expected, rel=1e-12)
