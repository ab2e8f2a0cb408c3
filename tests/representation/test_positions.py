"""Supervised positions: golden indices for every mode and anchor."""

from __future__ import annotations

import pytest

from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.representation.positions import supervised_positions

K = 3
MODES = ("all", "last", "last_k", "first_k")
# fmt: off
GOLDEN = {
    # (prompt, response): {anchor: indices under MODES}; k = 3
    (5, 7): {"token":     ([5, 6, 7, 8, 9, 10, 11], [11], [9, 10, 11], [5, 6, 7]),
             "predictor": ([4, 5, 6, 7, 8, 9, 10],  [10], [8, 9, 10],  [4, 5, 6])},
    (3, 2): {"token":     ([3, 4], [4], [3, 4], [3, 4]),
             "predictor": ([2, 3], [3], [2, 3], [2, 3])},
    (2, 3): {"token":     ([2, 3, 4], [4], [2, 3, 4], [2, 3, 4]),
             "predictor": ([1, 2, 3], [3], [1, 2, 3], [1, 2, 3])},
    (1, 1): {"token":     ([1], [1], [1], [1]),
             "predictor": ([0], [0], [0], [0])},
    (4, 0): {"token":     ([], [], [], []),
             "predictor": ([], [], [], [])},
    (0, 0): {"token":     ([], [], [], []),
             "predictor": ([], [], [], [])},
    # Nothing predicts y_1 of a rollout without a prompt: that position is left out.
    (0, 4): {"token":     ([0, 1, 2, 3], [3], [1, 2, 3], [0, 1, 2]),
             "predictor": ([0, 1, 2],    [2], [0, 1, 2], [0, 1])},
    (0, 1): {"token":     ([0], [0], [0], [0]),
             "predictor": ([], [], [], [])},
    (0, 3): {"token":     ([0, 1, 2], [2], [0, 1, 2], [0, 1, 2]),
             "predictor": ([0, 1],    [1], [0, 1],    [0, 1])},
}
# fmt: on


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("anchor", ["token", "predictor"])
@pytest.mark.parametrize("lengths", GOLDEN)
def test_golden_indices(lengths: tuple[int, int], anchor: str, mode: str) -> None:
    """0-based indices, ascending: never a prompt token under `token`, never the last one under `predictor`."""
    config = DistillConfig(positions=mode, k=K, position_anchor=anchor)
    expected = GOLDEN[lengths][anchor][MODES.index(mode)]
    assert list(supervised_positions(*lengths, config)) == expected


def test_token_anchor_is_the_authors_slice() -> None:
    """With k = T the token anchor is `ids[-T:]`, the slice of the released code."""
    prompt, response = 6, 4
    config = DistillConfig(positions="last_k", k=response)
    assert list(supervised_positions(prompt, response, config)) == list(range(prompt + response))[-response:]


def test_k_matters_only_where_it_is_named() -> None:
    """`all` and `last` ignore k; the default k covers short responses whole."""
    for k in (1, 2, 100):
        assert list(supervised_positions(2, 5, DistillConfig(positions="all", k=k))) == [2, 3, 4, 5, 6]
        assert list(supervised_positions(2, 5, DistillConfig(positions="last", k=k))) == [6]
    assert list(supervised_positions(2, 5, DistillConfig())) == [2, 3, 4, 5, 6]
    assert len(supervised_positions(2, 5000, DistillConfig())) == 2000
