"""How alike each student layer and each teacher layer are: linear CKA and held-out ridge R2, from streamed moments.

Shapes: N rows (response tokens), L_S student and L_T teacher layers scored, k_S and k_T their widths after projection.

What is compared. Not the residual stream itself: a state is the sum of all blocks so far, so adjacent layers' states
are nearly equal, and in many models a handful of massive dimensions carry most of their variance. Either makes all
scores of a neighbourhood alike. Compared is what a block ADDS, its update u_l = h_l - h_{l-1}: that is the block's own
work, and a block that was copied goes on doing it although the stream around it has changed. Three things follow:
 * The last layer's h is taken BEFORE the final norm. After it h_L - h_{L-1} would be mostly the stream, shrunk.
 * Layer 1's update needs h_0, the embedding. A pipeline stage has its first block's input: nothing else is exchanged.
 * Differences survive a projection only if h_l and h_{l-1} share it: use one `projection` for all layers of a model.

How. Updates are centred and partly whitened: u (C + s I)^(-1/2), C their covariance and s = WHITENING times its mean
eigenvalue. Directions stronger than average count alike, so a few loud ones cannot decide; weaker ones, mostly noise,
stay weak. No dimension is scaled on its own, which would depend on the basis: a rotation of either space changes nothing.
 * cka = ||X'Y||^2 / (||X'X|| ||Y'Y||) of whitened updates X, Y over training rows (Kornblith et al. 2019, linear CKA).
 * r2 = 1 - residual / variance over held-out rows, of the ridge regression from student update to whitened teacher
   update: the direction in which the bridge maps. It is 1 for exact, 0 for no better than the training mean.
 * combined = their average, standardised over each student layer's row, then over each teacher layer's column. Some
   updates are easy to predict from any layer; what tells is who predicts them better than the other layers do. The unit
   is a standard deviation: 0 is a pair like any other. Mean and deviation lean to the whole matrix's when entries are
   few (PRIOR_ENTRIES), so a student of one layer is scored too.

What it cannot see: a student that lost the teacher's very first layers feeds its later blocks what they were never
trained on, so they stop doing the same work; no score of activations finds their origin then.

Everything is a function of sums over rows (`PairMoments`), which add up over batches and over data-parallel ranks. Bytes
of one PairMoments: 8 (L_S k_S L_T k_T + L_S k_S^2 + L_T k_T^2 + L_S k_S + L_T k_T + 1), whatever N; 28 x 80 layers at
k = 128 take 308 MB, twice that for training and held-out rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from oprd_megatron.errors import UserError

WHITENING = 1.0
"""Added to every eigenvalue of an update's covariance before whitening, times their mean."""
RIDGE = 0.1
"""Ridge penalty, times the mean eigenvalue of the student update's covariance."""
PRIOR_ENTRIES = 1
"""How many entries of a row or column the whole matrix's mean and variance weigh as much as."""
ROUNDS = 2
"""How often rows, then columns are standardised: scaling columns unsettles the rows a little."""
ROWS_AT_ONCE = 1024
"""Rows cast to float64 at a time."""


@dataclass(frozen=True)
class LayerScores:
    """Scores of student layers (rows, 1-based ids) against teacher layers (columns, 1-based ids), float64."""

    student_layers: list[int]
    teacher_layers: list[int]
    cka: np.ndarray
    """[L_S, L_T], 0 to 1."""
    r2: np.ndarray
    """[L_S, L_T], at most 1; below 0 where the regression does worse than the training mean."""

    @property
    def combined(self) -> np.ndarray:
        """[L_S, L_T], in standard deviations. Needs ALL student layers: `join` the pipeline stages first."""
        evidence = (self.cka + np.clip(self.r2, 0.0, 1.0)) / 2
        for _ in range(ROUNDS):
            evidence = _standardised(_standardised(evidence, axis=1), axis=0)
        return evidence


def join(stages: Sequence[LayerScores]) -> LayerScores:
    """The scores of all pipeline stages as one, by ascending student layer. All score the same teacher layers."""
    assert all(stage.teacher_layers == stages[0].teacher_layers for stage in stages)
    student_layers = [layer for stage in stages for layer in stage.student_layers]
    assert len(set(student_layers)) == len(student_layers), f"a student layer on two stages: {student_layers}"
    order = np.argsort(student_layers)
    cka, r2 = (np.concatenate([getattr(stage, name) for stage in stages])[order] for name in ("cka", "r2"))
    return LayerScores(sorted(student_layers), stages[0].teacher_layers, cka, r2)


def projection(width: int, num_directions: int, seed: int) -> Tensor:
    """[width, min(width, num_directions)] float64: random orthonormal columns, the same on every rank.

    The QR's signs are fixed, so what is left between machines is rounding. One for all layers of a model.
    """
    directions = min(width, num_directions)
    generator = torch.Generator().manual_seed(seed)
    orthonormal, upper = torch.linalg.qr(torch.randn(width, directions, generator=generator, dtype=torch.float64))
    return orthonormal * upper.diagonal().sign()


class PairMoments:
    """Sums over rows of the student's and the teacher's updates, all pairs of layers; float64.

    Holds the training rows or the held-out rows: use two. See the module for its size.
    """

    def __init__(
        self,
        student_layers: Sequence[int],
        teacher_layers: Sequence[int],
        student_width: int,
        teacher_width: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.student_layers, self.teacher_layers = list(student_layers), list(teacher_layers)
        self.student_width, self.teacher_width = student_width, teacher_width
        num_s, num_t = len(self.student_layers), len(self.teacher_layers)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.num_rows = zeros(1)
        self.student_sum, self.teacher_sum = zeros(num_s, student_width), zeros(num_t, teacher_width)
        self.student_self = zeros(num_s, student_width, student_width)
        self.teacher_self = zeros(num_t, teacher_width, teacher_width)
        self.cross = zeros(num_s * student_width, num_t * teacher_width)

    def add(self, student: Mapping[int, Tensor], teacher: Mapping[int, Tensor]) -> None:
        """Add rows: {layer: updates [N, k_S]} and {layer: updates [N, k_T]}, any float type, the same tokens in order."""
        for side, layers, width in (
            (student, self.student_layers, self.student_width),
            (teacher, self.teacher_layers, self.teacher_width),
        ):
            shapes = {layer: tuple(side[layer].shape) for layer in layers}
            assert set(shapes.values()) == {(len(student[self.student_layers[0]]), width)}, f"{width} wide: {shapes}"
        for start in range(0, len(student[self.student_layers[0]]), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            x = torch.stack([student[layer][rows].double() for layer in self.student_layers])
            y = torch.stack([teacher[layer][rows].double() for layer in self.teacher_layers])
            self.num_rows += x.shape[1]
            self.student_sum += x.sum(dim=1)
            self.teacher_sum += y.sum(dim=1)
            self.student_self.baddbmm_(x.mT, x)
            self.teacher_self.baddbmm_(y.mT, y)
            self.cross.addmm_(x.transpose(0, 1).flatten(1).T, y.transpose(0, 1).flatten(1))

    def tensors(self) -> list[Tensor]:
        """The sums, float64, themselves and not copies: summed in place over data-parallel ranks they are the whole."""
        return [
            self.num_rows,
            self.student_sum,
            self.teacher_sum,
            self.student_self,
            self.teacher_self,
            self.cross,
        ]

    def centred(self, student_mean: Tensor, teacher_mean: Tensor) -> tuple[Tensor, Tensor]:
        """Covariances [L_S, k_S, k_S], [L_T, k_T, k_T] about the given means [L, k] (not about these rows' own)."""
        return (
            _about(self.student_self, self.student_sum, student_mean, self.num_rows),
            _about(self.teacher_self, self.teacher_sum, teacher_mean, self.num_rows),
        )

    def centred_cross(self, student_index: int, student_mean: Tensor, teacher_mean: Tensor) -> Tensor:
        """[L_T, k_S, k_T]: one student layer's covariance with every teacher layer, about the given means [L, k]."""
        k = self.student_width
        raw = (
            self.cross[student_index * k : (student_index + 1) * k]
            .view(k, len(self.teacher_layers), -1)
            .transpose(0, 1)
        )
        total, mean = self.student_sum[student_index, :, None], student_mean[student_index, :, None]
        about = raw - total * teacher_mean[:, None] - mean * self.teacher_sum[:, None]
        return about / self.num_rows + mean * teacher_mean[:, None]


def score_layers(train: PairMoments, held_out: PairMoments) -> LayerScores:
    """CKA over the training rows, R2 over the held-out rows of a regression fitted to the training rows.

    Raises:
        UserError: no row in either part, or sums that are not finite.
    """
    for name, part in (("training", train), ("held-out", held_out)):
        if part.num_rows.item() < 1:
            raise UserError(f"layer scores: no {name} rows; take more prompts or longer responses")
        if not all(torch.isfinite(tensor).all() for tensor in part.tensors()):
            raise UserError(
                f"layer scores: the {name} rows hold states that are not finite; check both models' weights"
            )
    student_mean, teacher_mean = train.student_sum / train.num_rows, train.teacher_sum / train.num_rows
    student_cov, teacher_cov = train.centred(student_mean, teacher_mean)
    held_student, held_teacher = held_out.centred(student_mean, teacher_mean)
    white_student, white_teacher = _whitener(student_cov), _whitener(teacher_cov)
    student_norm = torch.linalg.matrix_norm(white_student @ student_cov @ white_student)
    teacher_norm = torch.linalg.matrix_norm(white_teacher @ teacher_cov @ white_teacher)
    held_variance = _traces(white_teacher @ held_teacher, white_teacher)
    penalty = RIDGE * _mean_eigenvalue(student_cov)
    cka, r2 = [], []
    for index in range(len(train.student_layers)):
        cross = train.centred_cross(index, student_mean, teacher_mean) @ white_teacher
        alike = (white_student[index] @ cross).square().sum(dim=(1, 2))
        cka.append(_ratio(alike, student_norm[index] * teacher_norm))
        identity = torch.eye(train.student_width, dtype=torch.float64, device=cross.device)
        weights = torch.linalg.solve(student_cov[index] + penalty[index] * identity, cross)
        held_cross = held_out.centred_cross(index, student_mean, teacher_mean) @ white_teacher
        explained = 2 * _traces(weights, held_cross) - _traces(held_student[index] @ weights, weights)
        r2.append(_ratio(explained, held_variance))
    as_numpy = [torch.stack(values).cpu().numpy() for values in (cka, r2)]
    return LayerScores(train.student_layers, train.teacher_layers, *as_numpy)


def _about(second: Tensor, total: Tensor, mean: Tensor, num_rows: Tensor) -> Tensor:
    """Mean over rows of (x - mean)(x - mean)', from sums: second [L, k, k], total and mean [L, k] -> [L, k, k]."""
    crossed = total[:, :, None] * mean[:, None]
    return (second - crossed - crossed.mT) / num_rows + mean[:, :, None] * mean[:, None]


def _mean_eigenvalue(covariance: Tensor) -> Tensor:
    """[L, k, k] -> [L]; 1 for a layer that never moves, so that nothing is divided by zero."""
    mean = covariance.diagonal(dim1=1, dim2=2).mean(dim=1)
    return torch.where(mean > 0, mean, 1.0)


def _whitener(covariance: Tensor) -> Tensor:
    """(C + s I)^(-1/2), s = WHITENING times the mean eigenvalue of C; [L, k, k] -> [L, k, k], symmetric."""
    values, vectors = torch.linalg.eigh(covariance)
    raised = values.clamp_min(0) + WHITENING * _mean_eigenvalue(covariance)[:, None]
    return (vectors * raised.rsqrt()[:, None]) @ vectors.mT


def _traces(a: Tensor, b: Tensor) -> Tensor:
    """tr(a' b) of each pair of matrices: [L, k, j] each -> [L]."""
    return (a * b).sum(dim=(1, 2))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Their quotient; 0 where a layer never moves."""
    return torch.where(denominator > 0, numerator / denominator.clamp_min(torch.finfo(torch.float64).tiny), 0.0)


def _standardised(values: np.ndarray, axis: int) -> np.ndarray:
    """Minus mean, over deviation, along `axis`; both lean to the whole matrix's by PRIOR_ENTRIES entries."""
    count = values.shape[axis]
    weight = count / (count + PRIOR_ENTRIES)
    mean = weight * values.mean(axis=axis, keepdims=True) + (1 - weight) * values.mean()
    variance = weight * values.var(axis=axis, keepdims=True) + (1 - weight) * values.var()
    return np.divide(values - mean, np.sqrt(variance), out=np.zeros_like(values), where=variance > 0)
