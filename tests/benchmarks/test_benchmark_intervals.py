"""Intervals cover, and p-values are those of brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from oprd_megatron.benchmarks import intervals
from oprd_megatron.benchmarks.intervals import interval, sign_flip_p


def brute_force_p(differences: np.ndarray) -> float:
    """All 2^P sign patterns."""
    signs = np.array(list(itertools.product([-1, 1], repeat=len(differences))))
    sums = np.abs(signs @ differences)
    return float((sums >= abs(differences.sum()) - 1e-9).mean())


@pytest.mark.parametrize("samples", [1, 2, 3, 16])
def test_exact_p_is_that_of_all_sign_patterns(samples: int) -> None:
    """Ten problems, with ties and zeros; also where all differences share a factor."""
    rng = np.random.default_rng(samples)
    for shift in (0, 1, 2):
        differences = (rng.integers(-samples, samples + 1, size=10) + shift) / samples
        assert sign_flip_p(differences, 1 / samples) == pytest.approx(brute_force_p(differences), abs=1e-12)
    assert sign_flip_p(np.full(5, 0.5), 1 / 4) == pytest.approx(2 / 2**5)


def test_exact_p_of_ones_is_mcnemar() -> None:
    """For -1, 0, 1 it is the two-sided binomial test of the problems that changed."""
    differences = np.array([1.0] * 9 + [-1.0] * 2 + [0.0] * 40)
    wanted = 2 * sum(math.comb(11, wins) for wins in range(9, 12)) / 2**11
    assert sign_flip_p(differences, 1.0) == pytest.approx(wanted, abs=1e-12)


def test_p_of_500_problems_is_exact_and_fast() -> None:
    """500 problems, 16 samples: against the normal law, which it must be near."""
    rng = np.random.default_rng(0)
    differences = rng.integers(-16, 18, size=500) / 16
    z = abs(differences.sum()) / math.sqrt((differences**2).sum())
    assert sign_flip_p(differences, 1 / 16) == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.01)


def test_drawn_signs_agree_with_the_exact_p() -> None:
    """10,000 draws: three standard errors. A p of 0 is never given."""
    differences = np.random.default_rng(3).integers(-3, 5, size=12) / 4
    exact = sign_flip_p(differences, 1 / 4)
    assert abs(sign_flip_p(differences) - exact) < 3 * math.sqrt(exact * (1 - exact) / intervals.RESAMPLES) + 2e-4
    assert 0 < sign_flip_p(np.arange(1.0, 60.0)) < 2e-4


def test_alike_is_never_significant() -> None:
    """No difference at all, and nothing known."""
    assert sign_flip_p(np.zeros(5), 1.0) == 1.0
    assert sign_flip_p(np.array([math.nan, 0.0])) == 1.0


def test_interval_is_that_of_all_resamples() -> None:
    """Four problems: all 4^4 resamples, whose quantiles the drawn ones meet."""
    values = np.array([0.0, 0.25, 0.5, 1.0])
    means = np.array([np.mean(draw) for draw in itertools.product(values, repeat=4)])
    low, high = interval(values, seed=1)
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.0626)  # means lie 1/16 apart
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.0626)
    assert interval(values, seed=1) == (low, high)


def test_interval_is_that_of_the_normal_law() -> None:
    """400 problems: mean +- 1.96 standard errors. 3 % for the quantiles of 10,000 draws (90 % would be 16 % narrower)."""
    values = np.random.default_rng(2).normal(size=400)
    low, high = interval(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.03 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.03 * half)


def test_interval_covers_the_truth() -> None:
    """Of 200 samples of 60 problems, 0.95 of the intervals hold the true mean: 3 standard errors, and a small sample's loss."""
    rng = np.random.default_rng(5)
    intervals_of = [interval(rng.beta(0.5, 1.0, size=60), seed) for seed in range(200)]
    share = np.mean([low <= 1 / 3 <= high for low, high in intervals_of])
    assert 0.89 < share < 0.99


def test_interval_leaves_out_nan_and_needs_two() -> None:
    """One problem has no interval; NaN is not a problem."""
    assert all(math.isnan(bound) for bound in interval(np.array([0.5])))
    assert interval(np.array([0.0, 1.0, math.nan])) == interval(np.array([0.0, 1.0]))
