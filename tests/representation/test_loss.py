"""The loss on rows: value and gradient against the formula written out, and the edges where a loss turns into NaN."""

from __future__ import annotations

import math

import pytest
import torch

from oprd_megatron.representation.loss import ALIGNMENT_FIELDS, LossScale, alignment_sums, row_loss

D = 6


def rows(count: int, seed: int, width: int = D, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def formula(student: torch.Tensor, teacher: torch.Tensor, how: str) -> float:
    """Sum over rows of 1/d || h_S - h_T ||^2 in plain Python floats."""
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        if how == "l2":
            s, t = ([x / math.sqrt(sum(y * y for y in v)) for x in v] for v in (s, t))
        total += sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s)
    return total


@pytest.mark.parametrize("how", ["none", "l2"])
def test_value_equals_formula(how: str) -> None:
    """Sum over rows, mean over the width, in float64 to rounding."""
    student, teacher = rows(5, 1), 3 * rows(5, 2)
    assert row_loss(student, teacher, how).item() == pytest.approx(formula(student, teacher, how), rel=1e-13)


@pytest.mark.parametrize("how", ["none", "l2"])
def test_gradient_equals_finite_differences(how: str) -> None:
    """The student's gradient is that of the formula; no gradient reaches the teacher."""
    student, teacher = rows(3, 1).requires_grad_(), rows(3, 2).requires_grad_()
    row_loss(student, teacher, how).backward()
    assert teacher.grad is None
    step = 1e-6
    for row in range(3):
        for column in range(D):
            ends = []
            for sign in (1, -1):
                moved = student.detach().clone()
                moved[row, column] += sign * step
                ends.append(formula(moved, teacher.detach(), how))
            # Central differences of a sum of order 1: h^2 and eps / h are both about 1e-10.
            assert student.grad[row, column].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-8)


def test_raw_gradient_is_twice_the_difference_over_the_width() -> None:
    """d/dh_S of 1/d ||h_S - h_T||^2 is 2 (h_S - h_T) / d."""
    student, teacher = rows(4, 1).requires_grad_(), rows(4, 2)
    row_loss(student, teacher, "none").backward()
    torch.testing.assert_close(student.grad, 2 * (student.detach() - teacher) / D, rtol=1e-13, atol=0)


def test_normalised_term_is_two_minus_two_cosines_over_the_width() -> None:
    """OPRD: (2 - 2 cos) / d for each row, whatever the lengths of the vectors."""
    student, teacher = 7 * rows(5, 1), rows(5, 2) / 9
    cosine = torch.cosine_similarity(student, teacher, dim=-1)
    expected = ((2 - 2 * cosine) / D).sum()
    torch.testing.assert_close(row_loss(student, teacher, "l2"), expected, rtol=1e-12, atol=0)
    opposite = row_loss(student, -2 * student, "l2")
    torch.testing.assert_close(opposite, torch.tensor(5 * 4 / D, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("how", ["none", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_states_have_loss_and_gradient_zero(how: str, dtype: torch.dtype) -> None:
    """Student == teacher is exactly 0; a multiple of it is 0 under l2."""
    student = rows(4, 1, dtype=dtype).requires_grad_()
    loss = row_loss(student, student.detach().clone(), how)
    loss.backward()
    assert loss.item() == 0 and not student.grad.any()
    if how == "l2":
        assert row_loss(student, 5 * student.detach(), how).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("how", ["none", "l2"])
def test_no_rows_is_zero_with_zero_gradient(how: str) -> None:
    """A rank without supervised tokens contributes 0 and a gradient of the right shape, never NaN."""
    hidden = rows(3, 1, dtype=torch.float32).requires_grad_()
    loss = row_loss(hidden[:0], torch.zeros(0, D), how)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(hidden.grad, torch.zeros(3, D))


@pytest.mark.parametrize("zero", ["student", "teacher", "both"])
@pytest.mark.parametrize("how", ["none", "l2"])
def test_zero_vectors_stay_finite(how: str, zero: str) -> None:
    """A state of all zeros has no direction: value and gradient are finite all the same."""
    student, teacher = rows(2, 1, dtype=torch.float32), rows(2, 2, dtype=torch.float32)
    if zero in ("student", "both"):
        student[0] = 0
    if zero in ("teacher", "both"):
        teacher[0] = 0
    student.requires_grad_()
    loss = row_loss(student, teacher, how)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()
    # (|s| = 1, t = 0) and the other way round both leave 1/d of the row.
    if how == "l2":
        alone = {"student": 1 / D, "teacher": 1 / D, "both": 0.0}[zero]
        assert row_loss(student[:1], teacher[:1], how).item() == pytest.approx(alone, rel=1e-6)


def test_rows_add_up() -> None:
    """The sum over parts is the whole: micro-batches and ranks can be added in any split."""
    student, teacher = rows(7, 1), rows(7, 2)
    whole = alignment_sums(student, teacher, "l2")
    parts = sum(alignment_sums(student[a:b], teacher[a:b], "l2") for a, b in ((0, 3), (3, 3), (3, 7)))
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)


def test_scale_is_the_global_mean() -> None:
    """weight = layer's weight * coefficient / (|Lset| * M): ranks and layers of unequal size give Eq. 6."""
    scale = LossScale(coefficient=10.0, num_tokens=7, layer_weights={3: 0.5, 4: 1.5})
    assert scale.weight(3) == 0.5 * 10.0 / 14
    layers = [(rows(7, 1), rows(7, 2)), (rows(7, 3), rows(7, 4))]
    ranks = [(0, 1), (1, 7)]
    loss = sum(scale.weight(number) * row_loss(s[a:b], t[a:b], "none").item()
               for number, (s, t) in enumerate(layers, start=3) for a, b in ranks)  # fmt: skip
    expected = 10.0 * sum(w * (s - t).square().mean().item() for w, (s, t) in zip((0.5, 1.5), layers, strict=True)) / 2
    assert loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("how", ["none", "l2"])
def test_alignment_fields(how: str) -> None:
    """Sums over rows, float64, in the order of the names: loss terms, raw MSE, cosine, norm ratio, rows. No graph."""
    assert ALIGNMENT_FIELDS == ("loss", "mse", "cosine", "norm_ratio", "inside", "rows")
    student, teacher = rows(5, 1, dtype=torch.float32).requires_grad_(), 3 * rows(5, 2, dtype=torch.float32)
    sums = alignment_sums(student, teacher, how)
    assert sums.dtype == torch.float64 and sums.shape == (6,) and not sums.requires_grad
    s, t = student.detach().double(), teacher.double()
    dot = (s * t).sum(-1)
    expected = {
        "loss": formula(s, t, how),
        "mse": formula(s, t, "none"),
        "cosine": (dot / (s.norm(dim=-1) * t.norm(dim=-1))).sum().item(),
        "norm_ratio": (s.norm(dim=-1) / t.norm(dim=-1)).sum().item(),
        "inside": 0,
        "rows": 5,
    }
    for name, found in zip(ALIGNMENT_FIELDS, sums.tolist(), strict=True):
        assert found == pytest.approx(expected[name], rel=1e-5), name


def test_alignment_of_no_rows_is_zero() -> None:
    """Nothing supervised adds nothing to any sum."""
    empty = torch.zeros(0, D)
    assert torch.equal(alignment_sums(empty, empty, "l2"), torch.zeros(6, dtype=torch.float64))
