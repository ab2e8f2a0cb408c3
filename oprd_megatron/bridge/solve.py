"""The two closed forms of stage 1: principal directions of the teacher's states (OPRD Eq. 12) and the student's projection
(Eq. 13), each in float64 on one rank from its streamed moments.

The paper trains P_S for 20 epochs on |P_S h_S - P_T (h_T - mu)|^2. For a linear P_S that is a least-squares problem, of
which `ridge` finds the exact minimum in one step (plus a small ridge, which keeps directions that hardly occur from getting
large weights); every row of P_S is a problem of its own, so that the solution for r directions is the first r rows of that for
more.

Legend: D width, R directions or targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from oprd_megatron.bridge.moments import Moments, Regression


@dataclass(frozen=True)
class Directions:
    """Principal directions of one teacher layer, by falling variance.

    Attributes:
        mean: [D] float64.
        basis: [R, D] float64, orthonormal rows; the largest entry of each row is positive.
        variances: [R] float64.
        total: variance over all D directions.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    variances: torch.Tensor
    total: float


def principal_directions(moments: Moments, rank: int) -> Directions:
    """The first `rank` eigenvectors of the sample covariance."""
    variances, vectors = torch.linalg.eigh(moments.covariance)
    basis = vectors.flip(1)[:, :rank].T.contiguous()
    strongest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    return Directions(moments.mean, basis * strongest.sign(), variances.flip(0)[:rank], float(variances.sum()))


def ridge(moments: Regression, strength: float) -> torch.Tensor:
    """P [R, D] float64 that minimises sum |P x - y|^2 + strength * s |P|^2, where s is the mean of x x^T's diagonal (so that
    `strength` has no units). Directions in which x never varies get no weight."""
    values, vectors = torch.linalg.eigh(moments.inner)
    added = strength * values.sum() / len(values)
    seen = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    inverse = torch.where(seen, 1 / (values + added), torch.zeros_like(values))
    return (vectors @ (inverse.unsqueeze(1) * (vectors.T @ moments.cross))).T.contiguous()
