"""Streamed CKA and R2 against plain formulas on full matrices, and what must and must not change them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oprd_megatron.bridge import layer_scores as module
from oprd_megatron.bridge.assignment import best_monotone_map
from oprd_megatron.bridge.layer_scores import LayerScores, PairMoments, join, projection, score_layers
from oprd_megatron.errors import UserError

Rows = dict[int, torch.Tensor]


def updates(states: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """What each layer adds to the state below it; of layers whose input is there."""
    return {layer: states[layer] - states[layer - 1] for layer in sorted(states) if layer - 1 in states}


def random_rows(layers: list[int], num_rows: int, width: int, seed: int) -> Rows:
    """Rows with unequal directions and a mean, [num_rows, width] float64 each."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.3, 3, width, dtype=torch.float64)
    rows = torch.randn(len(layers), num_rows, width, generator=generator, dtype=torch.float64) * scale + 1.5
    return dict(zip(layers, rows, strict=True))


def moments(student: Rows, teacher: Rows) -> PairMoments:
    first_s, first_t = next(iter(student.values())), next(iter(teacher.values()))
    part = PairMoments(sorted(student), sorted(teacher), first_s.shape[1], first_t.shape[1])
    part.add(student, teacher)
    return part


def scored(student: Rows, teacher: Rows, num_train: int) -> LayerScores:
    """The first `num_train` rows train, the others are held out."""
    train = moments(*({layer: x[:num_train] for layer, x in side.items()} for side in (student, teacher)))
    held_out = moments(*({layer: x[num_train:] for layer, x in side.items()} for side in (student, teacher)))
    return score_layers(train, held_out)


def related_rows(num_rows: int = 400) -> tuple[Rows, Rows]:
    """A student of 3 layers, 6 wide, and a teacher of 4, 8 wide, related to it linearly plus noise."""
    student, noise = random_rows([2, 3, 5], num_rows, 6, seed=0), random_rows([1, 2, 3, 4], num_rows, 8, seed=1)
    mix = torch.randn(6, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    shown = [student[2] @ mix, student[3] @ mix, student[2] @ mix + student[5] @ mix, student[5] @ mix]
    return student, {layer: noise[layer] + x for layer, x in zip(noise, shown, strict=True)}


def plain_whitened(rows: np.ndarray) -> np.ndarray:
    """[k, k]: (C + s I)^(-1/2) by the singular values of the centred rows."""
    _, singular, right = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    values = singular**2 / len(rows)
    return right.T @ np.diag((values + module.WHITENING * values.mean()) ** -0.5) @ right


def plain_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Kornblith et al. 2019 on Gram matrices: <K, L> / (|K| |L|), of whitened centred rows."""
    of_x, of_y = ((r @ r.T) for r in ((x - x.mean(0)) @ plain_whitened(x), (y - y.mean(0)) @ plain_whitened(y)))
    return float((of_x * of_y).sum() / np.linalg.norm(of_x) / np.linalg.norm(of_y))


def plain_r2(x: np.ndarray, y: np.ndarray, held_x: np.ndarray, held_y: np.ndarray) -> float:
    """Ridge by stacking sqrt(penalty) I under the rows (no covariance), then residuals on the held-out rows."""
    white = plain_whitened(y)
    target, held_target = (y - y.mean(0)) @ white, (held_y - y.mean(0)) @ white
    inputs, held_inputs = x - x.mean(0), held_x - x.mean(0)
    penalty = module.RIDGE * inputs.var(0).mean() * len(x)
    stacked = np.vstack([inputs, np.sqrt(penalty) * np.eye(x.shape[1])])
    weights = np.linalg.lstsq(stacked, np.vstack([target, np.zeros((x.shape[1], y.shape[1]))]), rcond=None)[0]
    return float(1 - ((held_target - held_inputs @ weights) ** 2).sum() / (held_target**2).sum())


def test_equals_the_plain_formulas_on_full_matrices():
    """Every pair, rows given in uneven batches: as Gram-matrix CKA and least-squares ridge. Only rounding differs."""
    student, teacher = related_rows()
    train, held_out = (PairMoments([2, 3, 5], [1, 2, 3, 4], 6, 8) for _ in range(2))
    for start, end in ((0, 7), (7, 250), (250, 300)):
        train.add(*({layer: x[start:end] for layer, x in side.items()} for side in (student, teacher)))
    held_out.add(*({layer: x[300:] for layer, x in side.items()} for side in (student, teacher)))
    scores = score_layers(train, held_out)
    assert (scores.student_layers, scores.teacher_layers) == ([2, 3, 5], [1, 2, 3, 4])
    for i, a in enumerate([2, 3, 5]):
        for j, b in enumerate([1, 2, 3, 4]):
            x, y = student[a].numpy(), teacher[b].numpy()
            assert scores.cka[i, j] == pytest.approx(plain_cka(x[:300], y[:300]), abs=1e-10)
            assert scores.r2[i, j] == pytest.approx(plain_r2(x[:300], y[:300], x[300:], y[300:]), abs=1e-10)


def test_parts_add_up_to_the_whole(monkeypatch):
    """Their tensors summed as an all-reduce does, and in whatever pieces the rows are cast."""
    student, teacher = related_rows()
    whole = moments(student, teacher)
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 64)
    parts = [
        moments(*({layer: x[s] for layer, x in side.items()} for side in (student, teacher)))
        for s in (slice(0, 130), slice(130, 400))
    ]
    for mine, others in zip(parts[0].tensors(), parts[1].tensors(), strict=True):
        mine += others
    for mine, expected in zip(parts[0].tensors(), whole.tensors(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-9)
    for tensor in parts[1].tensors():
        tensor.zero_()
    assert all((tensor == 0).all() for tensor in (parts[1].cross, parts[1].num_rows)), "tensors() must not copy"


def test_memory_is_the_stated_formula_and_does_not_grow():
    """8 bytes a number, as the module says, before rows and after them."""
    student, teacher = related_rows()
    part = moments(student, teacher)
    stated = 8 * (3 * 6 * 4 * 8 + 3 * 6**2 + 4 * 8**2 + 3 * 6 + 4 * 8 + 1)
    assert sum(tensor.nbytes for tensor in part.tensors()) == stated
    assert 8 * (28 * 128 * 80 * 128 + 108 * 128**2 + 108 * 128 + 1) < 0.31e9


def test_a_copied_layer_scores_one():
    """CKA exactly 1, also rotated; R2 1 up to the ridge's shrinkage, and only for the copy; noise scores near 0."""
    student = random_rows([1, 2], 3000, 8, seed=5)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(6), dtype=torch.float64))[0]
    teacher = {1: random_rows([1], 3000, 8, seed=7)[1], 2: 3 * student[1] @ rotation - 4, 3: student[2]}
    scores = scored(student, teacher, 2000)
    np.testing.assert_allclose([scores.cka[0, 1], scores.cka[1, 2]], 1, atol=1e-12)
    assert scores.r2[0, 1] > 0.95 and scores.r2[1, 2] > 0.95
    assert max(scores.cka[0, 0], scores.cka[0, 2]) < 0.02 and abs(scores.r2[0, 0]) < 0.02
    assert best_monotone_map(scores.combined, strict=True, floor=None) == [2, 3]


def test_rotating_shifting_or_scaling_either_space_changes_nothing():
    """Only rounding: the scores are functions of spectra and of the rows' geometry."""
    student, teacher = related_rows()
    plain = scored(student, teacher, 300)
    generator = torch.Generator().manual_seed(8)
    turn_s, turn_t = (torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64))[0] for k in (6, 8))
    turned = scored(
        {layer: 0.2 * x @ turn_s + 7 for layer, x in student.items()},
        {layer: 5 * x @ turn_t - 2 for layer, x in teacher.items()},
        300,
    )
    np.testing.assert_allclose(turned.cka, plain.cka, atol=1e-10)
    np.testing.assert_allclose(turned.r2, plain.r2, atol=1e-10)


def shifted_copies(width: int, massive: float, num_rows: int = 1500) -> tuple[Rows, Rows, list[int]]:
    """States of a teacher of 10 blocks and of a student with 7 of them, whose stream is off by what it lacks.

    One direction of every state is `massive` times louder and moves alike in all layers.
    """
    origin = [1, 2, 4, 5, 7, 8, 10]
    generator = torch.Generator().manual_seed(11)
    work = torch.randn(11, num_rows, width, generator=generator, dtype=torch.float64)
    loud = torch.zeros(width, dtype=torch.float64)
    loud[0] = massive
    work = work + torch.randn(num_rows, 1, generator=generator, dtype=torch.float64) * loud
    disturbed = work + 1.5 * torch.randn(work.shape, generator=generator, dtype=torch.float64)
    teacher = work.cumsum(0)
    student = torch.cat([work[:1], disturbed[origin]]).cumsum(0)
    return dict(enumerate(student)), dict(enumerate(teacher)), origin


@pytest.mark.parametrize("massive", [0.0, 200.0])
def test_finds_the_copied_blocks_through_projections_to_fewer_dimensions(massive):
    """A narrower student, both sides projected, one massive direction: the origin, though states are nearly alike."""
    student, teacher, origin = shifted_copies(48, massive)
    narrow = torch.randn(48, 40, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    to_student, to_teacher = projection(40, 24, seed=1), projection(48, 32, seed=2)
    student_updates = updates({layer: x @ narrow @ to_student for layer, x in student.items()})
    teacher_updates = updates({layer: x @ to_teacher for layer, x in teacher.items()})
    scores = scored(student_updates, teacher_updates, 1000)
    for strict in (True, False):
        assert best_monotone_map(scores.combined, strict=strict, floor=None) == origin


def test_combined_is_not_led_by_an_update_that_any_layer_predicts():
    """A teacher layer that scores high with every student layer does not attract them."""
    evidence = np.full((4, 6), 0.1)
    evidence[:, 5] = 0.9
    evidence[[0, 1, 2, 3], [0, 1, 3, 4]] = 0.4
    scores = LayerScores([1, 2, 3, 4], [1, 2, 3, 4, 5, 6], evidence, evidence)
    assert best_monotone_map(evidence, strict=False, floor=None) == [6, 6, 6, 6]
    assert best_monotone_map(scores.combined, strict=False, floor=None) == [1, 2, 4, 5]


def test_combined_with_few_layers_keeps_the_order():
    """One student layer, one teacher layer, or equal scores: finite, and the best pair stays the best."""
    one = LayerScores([1], [1, 2, 3], np.array([[0.1, 0.8, 0.3]]), np.array([[0.0, 0.7, -2.0]]))
    assert one.combined.argmax() == 1 and np.isfinite(one.combined).all()
    column = LayerScores([1, 2], [1], np.array([[0.1], [0.8]]), np.array([[0.1], [0.8]]))
    assert column.combined.argmax() == 1 and np.isfinite(column.combined).all()
    alike = LayerScores([1, 2], [1, 2], np.full((2, 2), 0.5), np.full((2, 2), 0.5))
    np.testing.assert_array_equal(alike.combined, 0)


def test_a_negative_r2_counts_as_zero():
    """Worse than the mean is no evidence against a pair: an exploding regression must not sway the map."""
    cka = np.random.default_rng(0).random((3, 4))
    bad, none = np.full((3, 4), -50.0), np.zeros((3, 4))
    np.testing.assert_array_equal(
        LayerScores([1, 2, 3], [1, 2, 3, 4], cka, bad).combined,
        LayerScores([1, 2, 3], [1, 2, 3, 4], cka, none).combined,
    )


def test_pipeline_stages_join_in_layer_order():
    """Stages scored apart, given in any order, are the student scored at once."""
    student, teacher = related_rows()
    whole = scored(student, teacher, 300)
    stages = [scored({layer: student[layer] for layer in layers}, teacher, 300) for layers in ([5], [2, 3])]
    joined = join(stages)
    assert joined.student_layers == [2, 3, 5]
    np.testing.assert_allclose(joined.cka, whole.cka, atol=1e-12)
    np.testing.assert_allclose(joined.combined, whole.combined, atol=1e-9)


def test_dead_dimensions_dead_layers_and_few_rows_give_numbers():
    """A constant dimension, a layer that never moves, fewer rows than dimensions: finite; the dead layer scores 0."""
    student, teacher = random_rows([1, 2], 9, 16, seed=3), random_rows([1, 2, 3], 9, 12, seed=4)
    student[1][:, 0] = 4.0
    student[2] = torch.full_like(student[2], 0.5)
    teacher[3] = torch.zeros_like(teacher[3])
    scores = scored(student, teacher, 6)
    assert np.isfinite(scores.cka).all() and np.isfinite(scores.r2).all() and np.isfinite(scores.combined).all()
    assert (scores.cka[1] == 0).all() and (scores.cka[:, 2] == 0).all() and (scores.r2[:, 2] == 0).all()
    assert scores.cka.max() <= 1 + 1e-12


def test_low_precision_rows_are_summed_in_float64():
    """bfloat16 rows give what their exact values give."""
    student, teacher = related_rows()
    rounded = [{layer: x.bfloat16() for layer, x in side.items()} for side in (student, teacher)]
    exact = [{layer: x.double() for layer, x in side.items()} for side in rounded]
    torch.testing.assert_close(moments(*rounded).cross, moments(*exact).cross, rtol=0, atol=0)


def test_projection_is_orthonormal_fixed_and_no_wider_than_the_model():
    """Same seed, same matrix; another seed another; columns orthonormal; a narrow model is only rotated."""
    basis = projection(40, 12, seed=3)
    assert basis.shape == (40, 12) and projection(8, 12, seed=3).shape == (8, 8)
    torch.testing.assert_close(basis.T @ basis, torch.eye(12, dtype=torch.float64))
    assert torch.equal(basis, projection(40, 12, seed=3)) and not torch.allclose(basis, projection(40, 12, seed=4))


def test_refusals_in_one_line():
    """No rows in a part, or a state that is not finite."""
    student, teacher = related_rows()
    full, empty = moments(student, teacher), PairMoments([2, 3, 5], [1, 2, 3, 4], 6, 8)
    with pytest.raises(UserError, match="no training rows"):
        score_layers(empty, full)
    with pytest.raises(UserError, match="no held-out rows"):
        score_layers(full, empty)
    student[3][5, 2] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        score_layers(full, moments(student, teacher))
