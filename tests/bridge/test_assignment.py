"""The best monotone map against trying every map."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd_megatron.bridge.assignment import best_monotone_map
from oprd_megatron.errors import ConfigError, UserError


def is_monotone(layers: Sequence[int | None], strict: bool) -> bool:
    given_layers = [layer for layer in layers if layer is not None]
    return all(later >= earlier + strict for earlier, later in itertools.pairwise(given_layers))


def worth(scores: np.ndarray, layers: Sequence[int | None], floor: float | None) -> float:
    return float(sum((floor or 0.0) if layer is None else scores[row, layer - 1] for row, layer in enumerate(layers)))


def by_trying_all(scores: np.ndarray, strict: bool, floor: float | None) -> list[int | None]:
    """Every map, in reading order with None last; the first of those with the largest worth."""
    choices: list[int | None] = [*range(1, scores.shape[1] + 1), *([] if floor is None else [None])]
    maps: list[tuple[int | None, ...]] = [
        m for m in itertools.product(choices, repeat=len(scores)) if is_monotone(m, strict)
    ]
    worths = [worth(scores, layers, floor) for layers in maps]
    return list(maps[int(np.argmax(worths))])


@st.composite
def small_problems(draw):
    num_teacher = draw(st.integers(1, 5))
    strict = draw(st.booleans())
    num_student = draw(st.integers(1, min(4, num_teacher) if strict else 4))
    cells = draw(st.lists(st.integers(-3, 3), min_size=num_student * num_teacher, max_size=num_student * num_teacher))
    floor = draw(st.none() | st.integers(-4, 4))
    return np.array(cells, dtype=float).reshape(num_student, num_teacher), strict, floor


@settings(max_examples=400, deadline=None)
@given(small_problems())
def test_equals_trying_every_map(problem):
    """Same map, not only same worth: small integers make many ties, so this pins the tie-breaking as well."""
    scores, strict, floor = problem
    assert best_monotone_map(scores, strict=strict, floor=floor) == by_trying_all(scores, strict, floor)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("floor", [None, 0.6])
def test_real_numbers_reach_the_largest_sum(strict, floor):
    """Random real scores: the worth is that of the best map among all."""
    random = np.random.default_rng(3)
    for _ in range(20):
        scores = random.random((4, 6))
        found = best_monotone_map(scores, strict=strict, floor=floor)
        assert is_monotone(found, strict)
        best = by_trying_all(scores, strict, floor)
        assert worth(scores, found, floor) == pytest.approx(worth(scores, best, floor), abs=1e-12)


def test_skips_teacher_layers_ties_and_leaves_weak_layers_out():
    """Strict spreads two rows that want the same column; ties share it; a floor leaves the weak row out."""
    scores = np.array([[0.3, 0.9, 0.1, 0.2], [0.1, 0.8, 0.1, 0.3], [0.0, 0.0, 0.0, 0.7]])
    assert best_monotone_map(scores, strict=True, floor=None) == [1, 2, 4]
    assert best_monotone_map(scores, strict=False, floor=None) == [2, 2, 4]
    assert best_monotone_map(scores, strict=True, floor=0.5) == [2, None, 4]


def test_a_pair_below_the_floor_is_never_kept():
    """A layer that scores below the floor everywhere stays without a teacher layer, and does not block others."""
    scores = np.array([[0.9, 0.1, 0.1], [0.2, 0.2, 0.3], [0.1, 0.9, 0.1]])
    assert best_monotone_map(scores, strict=False, floor=0.5) == [1, None, 2]
    assert best_monotone_map(scores - 1, strict=False, floor=0.0) == [None, None, None]


def test_equal_scores_go_to_the_earliest_teacher_layers():
    """No information: strict 1, 2, 3, ties all 1; a layer worth exactly the floor is supervised."""
    scores = np.zeros((3, 5))
    assert best_monotone_map(scores, strict=True, floor=None) == [1, 2, 3]
    assert best_monotone_map(scores, strict=False, floor=None) == [1, 1, 1]
    assert best_monotone_map(scores, strict=True, floor=0.0) == [1, 2, 3]


def test_large_problem_is_quick_and_right():
    """28 x 80 with a planted path: found, whatever the noise below it."""
    random = np.random.default_rng(0)
    scores = random.random((28, 80)) * 0.5
    path = np.sort(random.choice(80, size=28, replace=False))
    scores[np.arange(28), path] = 1.0
    assert best_monotone_map(scores, strict=True, floor=None) == [int(column) + 1 for column in path]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(value):
    """The message names the pair, 1-based, in one line."""
    scores = np.zeros((2, 3))
    scores[1, 2] = value
    with pytest.raises(UserError, match=r"student layer 2 x teacher layer 3 is") as caught:
        best_monotone_map(scores, strict=False, floor=None)
    assert "\n" not in str(caught.value)


def test_refusals_in_one_line():
    """A strict map of more student than teacher layers, with a floor or without; an empty matrix."""
    for floor in (None, 0.0):
        with pytest.raises(
            ConfigError, match="3 student layers cannot each have a teacher layer of their own out of 2"
        ):
            best_monotone_map(np.zeros((3, 2)), strict=True, floor=floor)
    assert best_monotone_map(np.zeros((3, 2)), strict=False, floor=None) == [1, 1, 1]
    with pytest.raises(UserError, match=r"shape \(0, 4\)"):
        best_monotone_map(np.zeros((0, 4)), strict=False, floor=None)
