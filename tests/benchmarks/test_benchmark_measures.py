"""Measures against brute force, and their own laws."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oprd_megatron.benchmarks.measures import accuracy, best, distinct_ngrams, majority, pass_at


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_is_the_share_of_draws_with_a_right_response(samples: int) -> None:
    """Over all ways to draw j of n responses, for every c and j."""
    for correct, draws in itertools.product(range(samples + 1), range(1, samples + 1)):
        right = [number < correct for number in range(samples)]
        drawn = list(itertools.combinations(right, draws))
        wanted = sum(any(one) for one in drawn) / len(drawn)
        assert pass_at(np.array([correct]), np.array([samples]), draws)[0] == pytest.approx(wanted, abs=1e-12)


def test_pass_at_of_many_samples_is_finite() -> None:
    """Binomials of 10,000 do not fit a float; the product does. Compared with exact integers."""
    wanted = 1 - math.comb(9990, 100) / math.comb(10000, 100)
    assert pass_at(np.array([10]), np.array([10_000]), 100)[0] == pytest.approx(wanted, rel=1e-9)


def test_pass_at_ends_in_accuracy_and_best() -> None:
    """pass@1 is Avg@k, pass@k is Best@k, and it only grows in between."""
    correct, samples = np.arange(17), np.full(17, 16)
    curve = np.stack([pass_at(correct, samples, draws) for draws in range(1, 17)])
    assert np.allclose(curve[0], accuracy(correct, samples)) and np.allclose(curve[-1], best(correct))
    assert (np.diff(curve, axis=0) >= -1e-12).all()


def test_each_problem_may_have_its_own_number_of_responses() -> None:
    """Ragged counts: problem by problem the same as alone."""
    correct, samples = np.array([1, 3, 0]), np.array([2, 5, 4])
    apart = [pass_at(np.array([c]), np.array([n]), 2)[0] for c, n in zip(correct, samples, strict=True)]
    assert np.allclose(pass_at(correct, samples, 2), apart)


@given(st.lists(st.sampled_from([None, 0, 1, 2, 3]), min_size=1, max_size=9), st.integers(0, 3))
def test_majority_is_the_mean_over_fair_draws_among_the_winners(groups: list[int | None], right: int) -> None:
    """Brute force: every class with the most votes is drawn once. Order does not matter."""
    correct = [group == right for group in groups]
    votes = {group: groups.count(group) for group in groups if group is not None}
    winners = [group for group, count in votes.items() if count == max(votes.values())]
    wanted = sum(group == right for group in winners) / len(winners) if winners else 0.0
    vote = majority(groups, correct)
    assert vote.right == pytest.approx(wanted)
    assert majority(groups[::-1], correct[::-1]).right == vote.right
    assert (vote.winner is None) == (not winners)
    if vote.winner is not None:
        assert (
            groups[vote.winner] == (right if right in winners else groups[vote.winner])
            and groups[vote.winner] in winners
        )
        assert vote.share == votes[groups[vote.winner]] / len(groups)


def test_no_answer_does_not_vote() -> None:
    """Three without an answer do not outvote one right answer."""
    assert majority([None, None, None, 4], [False, False, False, True]).right == 1.0


@given(st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=4))
def test_distinct_ngrams_counts_within_responses_only(responses: list[list[int]]) -> None:
    """Against a plain loop; no 4-gram crosses from one response into the next."""
    grams = [tuple(one[i : i + 4]) for one in responses for i in range(len(one) - 3)]
    found = distinct_ngrams(responses)
    assert math.isnan(found) if not grams else found == len(set(grams)) / len(grams)


def test_distinct_ngrams_by_hand() -> None:
    """aaaaa has two equal 4-grams; a second response with the same text halves the share."""
    assert distinct_ngrams([[1, 1, 1, 1, 1]]) == 0.5
    assert distinct_ngrams([[1, 2, 3, 4], [1, 2, 3, 4]]) == 0.5
    assert distinct_ngrams([[1, 2, 3, 4], [2, 3, 4, 5]]) == 1.0
