"""Streamed second moments in float64: what a principal component analysis and a ridge regression need of any number of rows.

Sums over rows do not depend on how rows are cut into micro-batches or dealt to ranks, but for rounding in the sixteenth digit:
states whose mean is a thousand times their spread still keep ten digits of their covariance.

Legend: N rows of a call, D width of a state, R targets of a regression.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass
class Moments:
    """Sums over rows x [D]: their number, x [D] and x x^T [D, D]; and the smallest and largest of each dimension; float64."""

    count: torch.Tensor
    total: torch.Tensor
    outer: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def zeros(cls, width: int, device: torch.device) -> Moments:
        make = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=device)  # noqa: E731
        return cls(make(1), make(width), make(width, width), make(width) + torch.inf, make(width) - torch.inf)

    def add(self, rows: torch.Tensor) -> None:
        """Add rows [N, D] of any float dtype."""
        rows = rows.double()
        self.count += len(rows)
        self.total += rows.sum(0)
        self.outer.addmm_(rows.T, rows)
        if len(rows):
            self.low, self.high = torch.minimum(self.low, rows.amin(0)), torch.maximum(self.high, rows.amax(0))

    def reduce(self, owner: int, group: dist.ProcessGroup) -> None:
        """Put together what the ranks of a group have, on global rank `owner`. Five reductions."""
        for part in (self.count, self.total, self.outer):
            dist.reduce(part, owner, group=group)
        dist.reduce(self.low, owner, op=dist.ReduceOp.MIN, group=group)
        dist.reduce(self.high, owner, op=dist.ReduceOp.MAX, group=group)

    @property
    def constant(self) -> list[int]:
        """Dimensions that never change, from 0."""
        return torch.nonzero(self.low == self.high).flatten().tolist()

    @property
    def mean(self) -> torch.Tensor:
        """[D] float64."""
        return self.total / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """Sample covariance [D, D] float64; needs two rows."""
        centred = self.outer - torch.outer(self.total, self.total) / self.count
        return centred / (self.count - 1)


@dataclass
class Regression:
    """Sums over pairs of rows x [D] and targets y [R]: x x^T [D, D], x y^T [D, R] and their number; float64. Not centred: the
    projection P_S of Eq. 13 has no constant term."""

    count: torch.Tensor
    inner: torch.Tensor
    cross: torch.Tensor

    @classmethod
    def zeros(cls, width: int, targets: int, device: torch.device) -> Regression:
        make = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=device)  # noqa: E731
        return cls(make(1), make(width, width), make(width, targets))

    def add(self, rows: torch.Tensor, targets: torch.Tensor) -> None:
        """Add rows [N, D] and targets [N, R] of any float dtype."""
        rows = rows.double()
        self.count += len(rows)
        self.inner.addmm_(rows.T, rows)
        self.cross.addmm_(rows.T, targets.double())

    def reduce(self, owner: int, group: dist.ProcessGroup) -> None:
        """Sum over the ranks of a group, onto global rank `owner`. Three reductions."""
        for part in (self.count, self.inner, self.cross):
            dist.reduce(part, owner, group=group)
