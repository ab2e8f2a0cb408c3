"""What is reported of a fit: which ranks, which is recommended, and figures of hand-made states. (Figures of whole fits are
in test_fit.py.)"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from oprd_megatron.bridge.measure import HeldOutFigures, curve_table, measure, ranks_to_measure
from oprd_megatron.bridge.rank_plot import draw_rank_curve
from oprd_megatron.representation.bridge import LINEAR, Bridge
from oprd_megatron.representation.layer_map import LayerPair
from tests.ranks import run_ranks

PAIRS = [LayerPair(1, 2), LayerPair(2, 2), LayerPair(4, 5)]


def figures(cosine: dict[int, list[float]]) -> HeldOutFigures:
    table = np.array(list(cosine.values()))
    return HeldOutFigures(list(cosine), table, 1 - table / 2, table / 4)


@pytest.mark.parametrize(
    ("cosine", "expected"),
    [
        ({1: [0.7], 2: [0.9], 4: [0.95], 8: [0.941], 16: [0.93]}, 8),
        ({1: [0.7], 2: [0.9], 4: [0.95], 8: [0.939], 16: [0.93]}, 4),
        ({1: [0.99], 2: [0.5], 4: [0.2]}, 1),
        ({1: [0.5], 2: [0.5], 4: [0.5]}, 4),
        ({1: [0.8, 0.8], 2: [1.0, 0.1]}, 1),  # the mean over pairs, not the best pair
        ({1: [0.95], 2: [0.9], 4: [0.945]}, 4),  # not only where it is unbroken
        ({8: [0.3]}, 8),
    ],
)
def test_the_largest_rank_near_the_best_is_recommended(cosine: dict[int, list[float]], expected: int) -> None:
    """Within 0.01 of the best mean cosine; the paper's figures (72.3 at 1, 95.0 at 8, 94.1 at 32, 87.9 at 256) give 32."""
    assert figures(cosine).recommended() == expected
    paper = {1: [0.723], 4: [0.92], 8: [0.95], 32: [0.941], 256: [0.879], 2048: [0.77]}
    assert figures(paper).recommended() == 32


@pytest.mark.parametrize(
    ("most", "wanted", "expected"),
    [
        (8, None, [1, 2, 4, 8]),
        (9, None, [1, 2, 4, 8]),
        (7, None, [1, 2, 4]),
        (1, None, [1]),
        (8, 6, [1, 2, 4, 6, 8]),
        (8, 4, [1, 2, 4, 8]),
        (4, 10, [1, 2, 4, 10]),
    ],
)
def test_powers_of_two_and_the_wanted_rank(most: int, wanted: int | None, expected: list[int]) -> None:
    """Ascending, each once, none above the most but what is asked for."""
    assert ranks_to_measure(most, wanted) == expected


def test_figures_of_states_by_hand() -> None:
    """Directions of known length: the cosine is of unit vectors, row by row, so that neither a scale of a projection nor a long
    row counts; explained variance weighs rows by their square; a student row that P_S does not see has cosine and inside 0."""
    found = run_ranks(1, by_hand)[0]
    np.testing.assert_allclose(found.cosine, [[(1 - 1 + 0) / 3], [(1 + 0.28 + 0) / 3]], atol=1e-6)
    np.testing.assert_allclose(found.inside, [[(1 + 0.36 + 0) / 3], [(1 + 1 + 0) / 3]], atol=1e-6)
    total = 100 + (9 + 16) + (1 + 4)
    np.testing.assert_allclose(found.explained, [[(100 + 9 + 1) / total], [(100 + 25 + 1) / total]], atol=1e-6)


def by_hand() -> HeldOutFigures:
    mean = torch.tensor([1.0, 2.0, 3.0])
    teacher = torch.tensor([[10.0, 0, 0], [-3, 4, 0], [1, 0, 2]]) + mean
    student = torch.tensor([[2.0, 0, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 5, 0]])
    projection = 7 * torch.eye(4)[:2]  # of the second row it makes 7 * (0.6, 0.8), beside the teacher's 5 * (-0.6, 0.8)
    bridge = Bridge(2, means={2: mean}, teacher={2: torch.eye(3)[:2]}, student={1: {LINEAR: projection}})

    def run(batches: Any, bridge: Bridge, project: Any, on_rows: Any) -> None:
        on_rows(1, student, project(2, teacher), np.arange(3))

    stage: Any = SimpleNamespace(pairs=[LayerPair(1, 2)], platform=SimpleNamespace(device=torch.device("cpu")), run=run)
    return measure(stage, [], bridge, [1, 2])


def test_table_and_plot(tmp_path: Path) -> None:
    """The table names every rank, its means and its worst pair; the plot is a whole png, and no other file is left."""
    shown = figures({1: [0.5, 0.25, 0.75], 2: [0.5, 0.8, 0.2]})
    lines = curve_table(shown, PAIRS).splitlines()
    assert len(lines) == 3
    assert lines[1].split() == ["1", "0.5000", "0.2500", "(2", "<-", "2)", "0.7500"]
    assert lines[2].split() == ["2", "0.5000", "0.2000", "(4", "<-", "5)", "0.7500"]
    draw_rank_curve(shown, 2, tmp_path / "x.png")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
