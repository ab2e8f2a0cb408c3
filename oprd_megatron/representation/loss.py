"""The representation loss (OPRD Eq. 6) as pure functions on selected rows.

    loss = coefficient / |Lset| * sum_l  1/M * sum_m  1/d * || h_S[l, m] - stopgrad(h_T[l, m]) ||^2

M counts the supervised tokens of the GLOBAL batch (over micro-batches and data-parallel ranks): it is passed in as part of
`weight`, never computed from what happens to be local, so that no mean of local means can arise and a rank without
supervised tokens simply contributes 0.

Legend: N rows on this rank (one row = one supervised token of one layer), D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import cosine_similarity, normalize

Normalize = Literal["none", "l2"]


def row_loss(student: torch.Tensor, teacher: torch.Tensor, how: Normalize) -> torch.Tensor:
    """Sum over rows of the mean over the width of the squared difference.

    Args:
        student: [N, D] fp32.
        teacher: [N, D] fp32; no gradient flows to it.
        how: `none` compares the vectors as they are; `l2` scales both to unit length first, which makes a row's value
            (2 - 2 cos) / D.

    Returns:
        Scalar fp32; 0 for N = 0.
    """
    teacher = teacher.detach()
    if how == "l2":
        student, teacher = normalize(student, dim=-1), normalize(teacher, dim=-1)
    return (student - teacher).square().mean(-1).sum()


@dataclass(frozen=True)
class LossScale:
    """What turns a sum of `row_loss` into its share of Eq. 6 and 14.

    Attributes:
        coefficient: the configured factor on the loss.
        num_tokens: supervised tokens of the global batch.
        layer_weights: {student layer: weight}, 1 on average over Lset.
    """

    coefficient: float
    num_tokens: int
    layer_weights: Mapping[int, float]

    def weight(self, student_layer: int) -> float:
        return self.coefficient * self.layer_weights[student_layer] / (len(self.layer_weights) * self.num_tokens)


ALIGNMENT_FIELDS = ("loss", "mse", "cosine", "norm_ratio", "inside", "rows")


def alignment_sums(
    student: torch.Tensor, teacher: torch.Tensor, how: Normalize, inside: torch.Tensor | None = None
) -> torch.Tensor:
    """Sums over rows of what people look at, in the order of `ALIGNMENT_FIELDS`; add them over ranks and micro-batches,
    then divide by `rows`.

    Args:
        student, teacher: [N, D] fp32.
        how: normalisation of the loss.
        inside: [N] share of each student state that a frozen projection sees.

    Returns:
        [6] float64: the loss terms, raw squared error, cosine, |h_S| / |h_T|, `inside` (0 without one), and N.
    """
    with torch.no_grad():
        ratio = student.norm(dim=-1) / teacher.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        sums = (
            row_loss(student, teacher, how),
            row_loss(student, teacher, "none"),
            cosine_similarity(student, teacher, dim=-1).sum(),
            ratio.sum(),
            student.new_zeros(()) if inside is None else inside.sum(),
            student.new_tensor(float(student.size(0))),
        )
        return torch.stack([value.double() for value in sums])
