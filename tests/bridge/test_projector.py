"""The student's projector by gradient descent: near the closed form where there is one, better where there is none, the same
from any layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from oprd_megatron.bridge.projector import part_shapes, train_projector
from oprd_megatron.config.schema import BridgeConfig
from oprd_megatron.representation.bridge import LINEAR, project
from tests.bridge.stage1_on_ranks import Fit, fit_on_ranks
from tests.bridge.stage1_reference import LAYER_MAP, RANKS, make_pair, objective, ridge_of
from tests.ranks import run_ranks

WIDTH, TARGETS = 6, 3


def config_of(projector: str = "linear", **keys: object) -> BridgeConfig:
    values = {"solver": "sgd", "rank": TARGETS, "batch_rows": 64, "lr": 1e-2, "mlp_width": 32, **keys}
    return BridgeConfig(projector=projector, **values)  # type: ignore[arg-type]


def rows_of(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def error_of(parts: dict[str, torch.Tensor], rows: torch.Tensor, targets: torch.Tensor) -> float:
    return float((project(parts, rows) - targets).square().mean())


def test_linear_descent_comes_near_the_optimum() -> None:
    """On rows without preferred directions, with noise on the targets: objective within 1 % of the closed form's, each
    weight within 2 % of the largest."""
    rows = rows_of(1500, 1)
    targets = rows @ (0.3 * rows_of(TARGETS, 2)).T + 0.5 * rows_of(1500, 3)[:, :TARGETS]
    found = train_projector(rows, targets, config_of(), seed=4)[LINEAR].double().numpy()
    x, y = rows.double().numpy(), targets.double().numpy()
    best = ridge_of(x, y, 0.0)
    assert 1.0 <= objective(found, x, y, 0.0) / objective(best, x, y, 0.0) < 1.01
    assert np.abs(found - best).max() < 0.02 * np.abs(best).max()


def test_an_mlp_finds_what_no_matrix_can() -> None:
    """Targets that are even in the rows: the best matrix explains nothing of them, the MLP nine tenths, on fresh rows."""
    rows, fresh = rows_of(2000, 1), rows_of(500, 2)
    even = lambda x: x[:, :TARGETS].abs() - x[:, :TARGETS].abs().mean()  # noqa: E731
    linear, mlp = (
        train_projector(rows, even(rows), config_of(projector, epochs=40), seed=4) for projector in ("linear", "mlp")
    )
    variance = float(even(fresh).square().mean())
    assert error_of(linear, fresh, even(fresh)) > 0.9 * variance
    assert error_of(mlp, fresh, even(fresh)) < 0.1 * variance


@pytest.mark.parametrize("projector", ["linear", "mlp"])
def test_the_seed_alone_decides(projector: str) -> None:
    """The same tensors again, bit for bit; others with another seed; named and shaped as a bridge's file has them."""
    rows = rows_of(300, 1)
    targets = rows[:, :TARGETS].sin()
    config = config_of(projector, epochs=2)
    first, again, other = (train_projector(rows, targets, config, seed) for seed in (1, 1, 2))
    assert {name: tuple(part.shape) for name, part in first.items()} == part_shapes(config, WIDTH, TARGETS)
    for name, part in first.items():
        assert torch.equal(part, again[name]) and not torch.equal(part, other[name])
        assert part.dtype == torch.float32 and not part.requires_grad


def test_fewer_rows_than_a_batch_are_learned() -> None:
    """No batch is left out because it is not full."""
    rows = rows_of(WIDTH, 1)
    targets = 0.3 * rows[:, :1]
    found = train_projector(rows, targets, config_of(epochs=600), seed=1)
    assert error_of(found, rows, targets) < 1e-3 * float(targets.square().mean())


SGD = {"solver": "sgd", "epochs": 3, "batch_rows": 32, "lr": 1e-2, "mlp_width": 16}
LAYOUTS = ["dp1 > dp1", "tp2 > pp2", "dp1 @0-0 > dp1 @1-1"]


def test_the_same_from_any_layout(tmp_path: Path) -> None:
    """Rows are brought into the order of their tokens, so that the steps are the same: tensors differ by the rounding of the
    states alone, which Adam's few steps keep below 1e-4 of the largest; all ranks have the same bits. Another order of rows
    alone changes hundredths."""
    make_pair(tmp_path)
    fits = [Fit(layout, bridge={**SGD, "projector": kind}) for kind in ("linear", "mlp") for layout in LAYOUTS]
    found = {}
    for world in (1, 2):
        mine = [fit for fit in fits if fit.world == world]
        for fit, *ranks in zip(mine, *run_ranks(world, fit_on_ranks, tmp_path, mine), strict=True):
            found[fit.layout, fit.bridge["projector"]] = ranks
    for kind in ("linear", "mlp"):
        single = found[LAYOUTS[0], kind][0]
        assert single.figures.ranks == RANKS[-1:]
        assert bool(single.figures.inside.any()) == (kind == "linear")
        assert single.bridge.student.keys() == LAYER_MAP.keys()
        for layout in LAYOUTS[1:]:
            first, second = (rank.bridge.tensors() for rank in found[layout, kind])
            for name, tensor in single.bridge.tensors().items():
                assert torch.equal(first[name], second[name])
                largest = float(tensor.abs().max())
                np.testing.assert_allclose(first[name], tensor, rtol=0, atol=1e-4 * largest, err_msg=f"{layout} {name}")
            np.testing.assert_allclose(found[layout, kind][0].figures.cosine, single.figures.cosine, atol=1e-4)
