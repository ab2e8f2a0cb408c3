"""Streamed moments and the two closed forms, against numpy on whole matrices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from oprd_megatron.bridge.moments import Moments, Regression
from oprd_megatron.bridge.solve import principal_directions, ridge
from tests.bridge.stage1_on_ranks import Fit, build_stage
from tests.bridge.stage1_reference import (
    RANKS,
    directions_of,
    make_pair,
    objective,
    ragged_batches,
    ridge_of,
    sine,
)
from tests.live_bytes import LiveBytes
from tests.ranks import run_ranks

CPU = torch.device("cpu")
WIDTH, TARGETS = 12, 5


def rows_of(count: int, width: int = WIDTH, mean: float = 3.0, seed: int = 0) -> np.ndarray:
    """Rows with unequal directions and a mean, float64."""
    generator = np.random.default_rng(seed)
    turn = np.linalg.qr(generator.normal(size=(width, width)))[0]
    return generator.normal(size=(count, width)) * 0.7 ** np.arange(width) @ turn + mean


def moments_of(rows: np.ndarray, cuts: tuple[int, ...] = ()) -> Moments:
    moments = Moments.zeros(rows.shape[1], CPU)
    for part in np.split(rows, cuts):
        moments.add(torch.from_numpy(part))
    return moments


def test_moments_are_numpys_however_rows_are_cut() -> None:
    """Mean and sample covariance (n - 1 below) of rows in any pieces, empty ones too."""
    rows = rows_of(90)
    for cuts in ((), (1, 1, 40), (0, 89, 90)):
        moments = moments_of(rows, cuts)
        assert int(moments.count) == 90
        np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance, np.cov(rows.T), rtol=0, atol=1e-12)
        np.testing.assert_array_equal(moments.low, rows.min(0))
        np.testing.assert_array_equal(moments.high, rows.max(0))


def test_a_large_mean_costs_no_direction() -> None:
    """fp32 states with a mean a thousand times their spread: directions of the rows as they are in fp32, to the module's ten
    digits."""
    rows = rows_of(400, mean=1000.0).astype(np.float32)
    moments = Moments.zeros(WIDTH, CPU)
    for part in np.split(rows, 8):
        moments.add(torch.from_numpy(part))
    expected = directions_of(rows.astype(np.float64), 4)
    assert sine(expected.basis, principal_directions(moments, 4).basis.numpy()) < 1e-8
    np.testing.assert_allclose(moments.covariance, np.cov(rows.astype(np.float64).T), rtol=0, atol=1e-8)


def test_constant_dimensions_are_exact() -> None:
    """Those whose every number is the same, however large; one that changes in its last bit is not one."""
    rows = rows_of(50).astype(np.float32)
    rows[:, 3], rows[:, 8], rows[:, 5] = 1e4, 0.0, 1e4
    rows[17, 5] = np.nextafter(np.float32(1e4), np.float32(2e4))
    assert moments_of(rows, (10,)).constant == [3, 8]


def test_directions_are_signed_and_sorted() -> None:
    """Orthonormal, by falling variance, the largest entry of each positive, whatever the sign of the rows."""
    rows = rows_of(300)
    found, turned = (principal_directions(moments_of(sign * rows), 6) for sign in (1, -1))
    expected = directions_of(rows, WIDTH)
    basis = found.basis.numpy()
    np.testing.assert_allclose(basis @ basis.T, np.eye(6), atol=1e-12)
    np.testing.assert_allclose(basis, expected.basis[:6], atol=1e-9)
    np.testing.assert_allclose(turned.basis, basis, atol=1e-9)
    np.testing.assert_allclose(found.variances, expected.variances[:6], rtol=1e-10)
    assert found.total == pytest.approx(expected.variances.sum(), rel=1e-10)
    assert (np.diff(found.variances) < 0).all() and (basis[np.arange(6), np.abs(basis).argmax(1)] > 0).all()


def regression_of(rows: np.ndarray, targets: np.ndarray, cuts: tuple[int, ...] = ()) -> Regression:
    moments = Regression.zeros(rows.shape[1], targets.shape[1], CPU)
    for x, y in zip(np.split(rows, cuts), np.split(targets, cuts), strict=True):
        moments.add(torch.from_numpy(x), torch.from_numpy(y))
    return moments


@pytest.mark.parametrize("strength", [0.0, 1e-4, 0.3])
def test_ridge_is_the_minimum(strength: float) -> None:
    """Numpy's least squares with the penalty's rows below; no step in any direction gets lower; twice the rows, the same
    solution (the strength has no units, and neither has the scale of the rows)."""
    rows = rows_of(80)
    targets = rows @ np.random.default_rng(1).normal(size=(WIDTH, TARGETS)) + rows_of(80, TARGETS, seed=2)
    found = ridge(regression_of(rows, targets, (7, 50)), strength).numpy()
    np.testing.assert_allclose(found, ridge_of(rows, targets, strength), atol=1e-8)
    least = objective(found, rows, targets, strength)
    generator = np.random.default_rng(3)
    for _ in range(20):
        assert objective(found + 1e-3 * generator.normal(size=found.shape), rows, targets, strength) > least
    twice = ridge(regression_of(np.tile(rows, (2, 1)), np.tile(targets, (2, 1))), strength).numpy()
    np.testing.assert_allclose(twice, found, atol=1e-9)
    np.testing.assert_allclose(ridge(regression_of(10 * rows, targets), strength).numpy() * 10, found, atol=1e-8)


def test_directions_that_never_occur_get_no_weight() -> None:
    """A student dimension that is always 0, and one that copies another, without any ridge: finite, and the least of all
    solutions."""
    rows = rows_of(60)
    rows[:, 2], rows[:, 9] = 0.0, rows[:, 4]
    targets = rows[:, :TARGETS] @ np.ones((TARGETS, TARGETS))
    found = ridge(regression_of(rows, targets), 0.0).numpy()
    np.testing.assert_allclose(found, np.linalg.lstsq(rows, targets, rcond=1e-12)[0].T, atol=1e-7)
    assert np.abs(found[:, 2]).max() < 1e-12


def test_rows_of_a_target_do_not_depend_on_the_others() -> None:
    """The solution for the first two directions is the first two rows of the whole: what makes a bridge sliceable."""
    rows, targets = rows_of(80), rows_of(80, TARGETS, seed=2)
    np.testing.assert_allclose(
        ridge(regression_of(rows, targets[:, :2]), 1e-4), ridge(regression_of(rows, targets), 1e-4)[:2], atol=1e-12
    )


def test_reduced_on_one_rank() -> None:
    """Rows dealt over three ranks unevenly, one with none: the owner, and it alone, has the moments of all."""
    rows = rows_of(70)
    parts = run_ranks(3, reduced, rows)
    for owner in (0, 2):
        moments, regression = parts[owner][owner]
        np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance, np.cov(rows.T), atol=1e-11)
        np.testing.assert_array_equal(moments.low, rows.min(0))
        np.testing.assert_array_equal(moments.high, rows.max(0))
        assert int(moments.count) == int(regression.count) == 70
        np.testing.assert_allclose(regression.inner, rows.T @ rows, rtol=1e-12)
        np.testing.assert_allclose(regression.cross, rows.T @ rows[:, :TARGETS], rtol=1e-12)


def reduced(rows: np.ndarray) -> dict[int, tuple[Moments, Regression]]:
    import torch.distributed as dist

    part = np.split(rows, (20, 20))[dist.get_rank()]
    found = {}
    for owner in (0, 2):
        found[owner] = moments_of(part), regression_of(part, part[:, :TARGETS])
        for moments in found[owner]:
            moments.reduce(owner, dist.group.WORLD)
    return found


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Both passes over three times as many batches have the same most bytes alive, counted from outside (ridge); the control:
    with sgd, which keeps its rows, they have more."""
    make_pair(tmp_path)
    peaks = run_ranks(1, peaks_of_fits, tmp_path)[0]
    assert peaks["ridge", 6] == peaks["ridge", 2]
    kept = 4 * 74 * (32 + RANKS[-1])  # bytes of a batch's rows of one layer
    assert peaks["sgd", 6] >= peaks["sgd", 2] + 4 * kept


def peaks_of_fits(folder: Path) -> dict[tuple[str, int], int]:
    found = {}
    for solver in ("ridge", "sgd"):
        stage = build_stage(folder, Fit("dp1 > dp1", bridge={"solver": solver, "epochs": 1, "batch_rows": 64}))
        for count in (2, 2, 6):  # the first warms caches up
            batches = ragged_batches(1) * count
            with LiveBytes() as alive:
                bridge, _ = stage.directions(batches, RANKS[-1])
                stage.projections(batches, bridge)
            found[solver, count] = alive.peak
    return found
