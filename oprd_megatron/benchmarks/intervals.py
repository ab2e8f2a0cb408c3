"""How sure a mean over problems is, and whether two checkpoints differ: resampling over problems, seeded.

Problems are the unit, not responses: 16 responses to one problem are not 16 independent facts.

Shapes: P problems, D resamples.
"""

from __future__ import annotations

import math

import numpy as np

RESAMPLES = 10_000
AT_ONCE = 500
"""Resamples in memory at a time."""

LARGEST_EXACT = 10_000_000
"""Operations of the exact test; beyond them signs are drawn."""


def interval(values: np.ndarray, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over problems.

    Of differences between two checkpoints on the same problems it is the paired bootstrap.

    Args:
        values: [P], one a problem; NaN is left out.
        seed: of the resampling.
        level: share of resampled means inside.

    Returns:
        (low, high); NaN both with fewer than two problems.
    """
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    parts = [
        values[rng.integers(len(values), size=(AT_ONCE, len(values)))].mean(1) for _ in range(RESAMPLES // AT_ONCE)
    ]
    low, high = np.quantile(np.concatenate(parts), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def sign_flip_p(differences: np.ndarray, unit: float | None = None, seed: int = 0) -> float:
    """Two-sided p-value of the paired permutation test: if two checkpoints were alike, each problem's difference could as well
    have the other sign. p = share of all 2^P sign patterns whose |sum| is at least the one that was seen.

    With differences that are multiples of `unit`, the distribution of the sum is computed exactly, by adding one problem after
    the other. For differences of -1, 0 and 1 (Best@k) this is McNemar's exact test. Without `unit`, signs are drawn
    `RESAMPLES` times, and p is (hits + 1) / (draws + 1).

    Args:
        differences: [P]; NaN is left out.
        unit: of the differences, such as 1/k for accuracies over k samples; None if there is none.
        seed: of drawn signs.
    """
    differences = differences[~np.isnan(differences)]
    sizes = np.abs(differences[differences != 0])
    if len(sizes) == 0:
        return 1.0
    if unit is not None:
        steps = np.rint(sizes / unit).astype(np.int64)
        assert np.allclose(steps * unit, sizes), f"differences are not multiples of {unit}"
        steps //= np.gcd.reduce(steps)
        if len(steps) * int(steps.sum()) <= LARGEST_EXACT:
            seen = round(abs(float(differences.sum())) / float(sizes.sum()) * int(steps.sum()))
            return _exact_p(steps, seen)
    rng = np.random.default_rng(seed)
    least = abs(float(differences.sum())) * (1 - 1e-9)  # equal sums in another order are equal
    hits = sum(
        int((np.abs(rng.choice([-1.0, 1.0], size=(AT_ONCE, len(sizes))) @ sizes) >= least).sum())
        for _ in range(RESAMPLES // AT_ONCE)
    )
    return (hits + 1) / (RESAMPLES // AT_ONCE * AT_ONCE + 1)


def _exact_p(steps: np.ndarray, seen: int) -> float:
    """P(|sum of +-steps| >= seen) over fair signs.

    The sum is 2 x (steps with a plus) - all, so it is enough to know how the plus part is distributed.
    """
    total = int(steps.sum())
    chance = np.zeros(total + 1)
    chance[0] = 1.0
    for step in steps.tolist():
        chance = 0.5 * (chance + np.concatenate([np.zeros(step), chance[:-step]]))
    sums = np.abs(2 * np.arange(total + 1) - total)
    return float(min(1.0, chance[sums >= seen].sum()))
