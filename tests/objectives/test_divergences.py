"""Output-space terms on logits: expectations over all tokens of a small vocabulary, the few cases without a set to compare, and
distributions at the ends of fp32. (`test_fused_terms.py` compares every term with its formula.)"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from oprd_megatron.objectives.divergences import (
    Gradient,
    compared_set,
    full_,
    odds_of_rest,
    outcome_log_probs,
    reverse_on_outcomes,
    sampled,
)
from tests.ranks import run_ranks

VOCAB = 23


def two_models(scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [VOCAB] of student and teacher in float64."""
    draw = torch.Generator().manual_seed(4)
    return tuple(scale * torch.randn(VOCAB, generator=draw, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def gradient_of(divergence: str, z: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(value, gradient by z [VOCAB]) by autograd."""
    z = z.clone().requires_grad_()
    log_p, log_q = z.log_softmax(-1), w.log_softmax(-1)
    first, second = (log_p, log_q) if divergence == "reverse" else (log_q, log_p)
    value = (first.exp() * (first - second)).sum()
    value.backward()
    return value.detach(), z.grad


def whole(gradient: Gradient, probs: torch.Tensor) -> torch.Tensor:
    """The parts of a gradient added up, [n, V], from the student's probabilities."""
    total = torch.zeros_like(probs) if gradient.dense is None else gradient.dense.clone()
    if gradient.of_probs is not None:
        total += gradient.of_probs.unsqueeze(-1) * probs
    return total if gradient.ids is None else total.scatter_add(-1, gradient.ids, gradient.at_ids)


@pytest.mark.parametrize(
    ("estimator", "direction"), [("policy_gradient", "reverse"), ("k2", "reverse"), ("k3", "forward")]
)
def test_mean_of_an_estimators_gradient(estimator: str, direction: str) -> None:
    """sum_y p(y) * gradient(y) over all y is the gradient of the exact divergence: reverse KL's for policy_gradient and k2,
    forward KL's for k3."""
    z, w = two_models()
    log_p, log_q, y = z.log_softmax(-1), w.log_softmax(-1), torch.arange(VOCAB)
    _, gradient = sampled(log_p, log_q, y, estimator)
    mean = log_p.exp() @ whole(gradient, log_p.exp().expand(VOCAB, VOCAB))
    torch.testing.assert_close(mean, gradient_of(direction, z, w)[1], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(mean, gradient_of({"reverse": "forward"}.get(direction, "reverse"), z, w)[1], atol=1e-2)


@pytest.mark.parametrize("estimator", ["policy_gradient", "k3"])
def test_mean_of_an_estimators_value(estimator: str) -> None:
    """sum_y p(y) * value(y) is reverse KL."""
    z, w = two_models()
    value, _ = sampled(z.log_softmax(-1), w.log_softmax(-1), torch.arange(VOCAB), estimator)
    torch.testing.assert_close(z.softmax(-1) @ value, gradient_of("reverse", z, w)[0], rtol=1e-10, atol=0)


@pytest.mark.parametrize("estimator", ["policy_gradient", "k2", "k3"])
def test_a_token_that_the_student_would_not_sample(estimator: str) -> None:
    """log p = -inf adds nothing, whatever q; log p = -300 gives finite numbers."""
    log_p, log_q = torch.tensor([-torch.inf, -torch.inf, -300.0]), torch.tensor([-1.0, -torch.inf, -1.0])
    value, gradient = sampled(log_p, log_q, torch.tensor([0, 1, 2]), estimator)
    assert not value[:2].any() and not gradient.of_probs[:2].any() and not gradient.at_ids[:2].any()
    assert value[2] != 0 and all(t.isfinite().all() for t in (value, gradient.of_probs, gradient.at_ids.square()))


def test_compared_sets() -> None:
    """Every support by hand; an id that both models have counts once."""
    student, teacher = torch.tensor([[3, 1, 7], [3, 1, 7]]), torch.tensor([[7, 2, 3], [4, 5, 6]])
    chosen = {}
    for support in ("student", "teacher", "intersection", "union"):
        ids, mask = compared_set(support, student, teacher)
        chosen[support] = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    assert chosen == {
        "student": [[3, 1, 7], [3, 1, 7]], "teacher": [[7, 2, 3], [4, 5, 6]],
        "intersection": [[3, 7], []], "union": [[3, 1, 7, 2], [3, 1, 7, 4, 5, 6]],
    }  # fmt: skip


@pytest.mark.parametrize("in_set", [0, 1])
def test_fewer_than_two_tokens(in_set: int) -> None:
    """Renormalised: value and gradient are exactly 0, also where the set is empty."""
    mask = torch.tensor([[False, False, False]])
    mask[:, :in_set] = True
    log_p, log_q = (outcome_log_probs(torch.tensor(logits), mask) for logits in ([[3.0, 1.0, 2.0]], [[-2.0, 0.0, 9.0]]))
    value, gradient = reverse_on_outcomes(log_p, log_q, torch.tensor([[5, 6, 7]]))
    assert not value.any() and not gradient.at_ids.any() and gradient.of_probs is None and gradient.dense is None


def test_excluded_ids_in_a_set() -> None:
    """Logits of -inf of the student, the teacher, both, or all of the student's: nothing is NaN, and p = 0 adds nothing."""
    inf, mask = torch.inf, torch.ones(3, 3, dtype=torch.bool)
    student = torch.tensor([[0.0, 1.0, -inf], [0.0, 1.0, -inf], [-inf, -inf, -inf]])
    teacher = torch.tensor([[0.0, 1.0, 0.5], [0.0, 1.0, -inf], [0.0, 1.0, 2.0]])
    ids = torch.arange(3).expand(3, 3)
    value, gradient = reverse_on_outcomes(outcome_log_probs(student, mask), outcome_log_probs(teacher, mask), ids)
    kept = teacher[0].softmax(-1)[:2].sum()
    torch.testing.assert_close(
        value, torch.stack([-kept.log(), torch.tensor(0.0), torch.tensor(0.0)]), rtol=1e-5, atol=1e-6
    )
    assert gradient.at_ids.abs().max() <= 1e-6


def with_tail(z: torch.Tensor, w: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Reverse KL with the rest as an outcome, from whole logits [n, V] in fp32."""
    group, mask, made = dist.group.WORLD, torch.ones_like(ids, dtype=torch.bool), []
    shards = [part.float().chunk(group.size(), -1)[group.rank()].log_softmax(-1) for part in (z, w)]
    for log_probs in shards:
        odds = odds_of_rest(log_probs, log_probs.gather(-1, ids), ids, mask, group)
        made.append(
            outcome_log_probs(torch.nn.functional.pad(odds, (0, 1)), torch.nn.functional.pad(mask, (0, 1), value=True))
        )
    value, gradient = reverse_on_outcomes(*made, ids)
    return {"value": value, "gradient": whole(gradient, shards[0].exp())}


@pytest.mark.parametrize("lead", [0.0, 10.0, 20.0, 60.0])
def test_a_rest_that_is_nearly_nothing(lead: float) -> None:
    """Logits that lead by up to 60: the rest has down to e^-60 of the mass, which 1 - sum does not see. Value and gradient are
    right to 1e-5 of a nat or of themselves, with either model peaked."""
    draw = torch.Generator().manual_seed(8)
    z, w = (torch.randn(4, VOCAB, generator=draw, dtype=torch.float64) for _ in range(2))
    ids = torch.tensor([[0, 5]]).expand(4, 2)
    z[:2, [0, 5]] += lead
    w[1:3, [0, 5]] += lead
    logits = z.float().double().requires_grad_()
    outcomes = []
    for part in (logits, w.float().double()):
        inside, outside = part[:, [0, 5]], part[:, [i for i in range(VOCAB) if i not in (0, 5)]]
        outcomes.append(torch.cat([inside, outside.logsumexp(-1, keepdim=True)], dim=-1).log_softmax(-1))
    value = (outcomes[0].exp() * (outcomes[0] - outcomes[1])).sum(-1)
    value.sum().backward()
    found = run_ranks(1, with_tail, z, w, ids)[0]
    torch.testing.assert_close(found["value"].double(), value.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["gradient"].double(), logits.grad, rtol=1e-5, atol=1e-5 * (1 + value.max().item()))


def test_a_set_of_the_whole_vocabulary() -> None:
    """Nothing is left as the rest: the same as the exact divergence, without NaN."""
    z, w = (part.unsqueeze(0) for part in two_models())
    found = run_ranks(1, with_tail, z, w, torch.arange(VOCAB).unsqueeze(0))[0]
    value, gradient = gradient_of("reverse", z[0], w[0])
    torch.testing.assert_close(found["value"][0].double(), value, rtol=1e-5, atol=0)
    torch.testing.assert_close(found["gradient"][0].double(), gradient, rtol=1e-4, atol=1e-5)


def extremes() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [5, 16], the last 2 ids excluded by both: ordinary; the student leads by 1e4, and the teacher, elsewhere; ids that
    only the student excludes; ids that both exclude."""
    draw = torch.Generator().manual_seed(9)
    z, w = torch.randn(5, 16, generator=draw), torch.randn(5, 16, generator=draw)
    z[1, 7] = w[2, 8] = 1e4
    z[3, 3:9] = -torch.inf
    z[4, 3:9] = w[4, 3:9] = -torch.inf
    z[:, 14:] = w[:, 14:] = -torch.inf
    return z, w


def fulls_on_extremes() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    group, found = dist.group.WORLD, {}
    for divergence in ("reverse", "forward", "jensen_shannon"):
        log_p, log_q = (logits.log_softmax(-1) for logits in extremes())
        value, gradient = full_(log_p, log_q, divergence, 0.3, group)
        assert gradient.of_probs is None and gradient.ids is None
        torch.testing.assert_close(log_p, extremes()[0].softmax(-1), rtol=1e-5, atol=0)
        found[divergence] = (value, gradient.dense)
    return found


def test_full_divergences_at_the_ends_of_fp32() -> None:
    """Against float64, with 0 log 0 = 0: gradients are finite throughout; forward KL alone is infinite where only the student
    excludes an id."""
    z, w = (logits.double() for logits in extremes())
    found = run_ranks(1, fulls_on_extremes)[0]
    log_p, log_q = z.log_softmax(-1), w.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p + torch.tensor(0.3).log(), log_q + torch.tensor(0.7).log())

    def kl(one: torch.Tensor, log_one: torch.Tensor, log_other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ratio = (log_one - log_other).masked_fill(one == 0, 0.0)
        return (one * ratio).sum(-1), ratio

    (reverse, ratio), (forward, _), (to_m, ratio_m) = kl(p, log_p, log_q), kl(q, log_q, log_p), kl(p, log_p, log_m)
    expected = {
        "reverse": (reverse, p * (ratio - reverse[:, None])),
        "forward": (forward, p - q),
        "jensen_shannon": (0.3 * to_m + 0.7 * kl(q, log_q, log_m)[0], 0.3 * p * (ratio_m - to_m[:, None])),
    }
    assert forward.isinf().tolist() == [False, False, False, True, False]
    for name, (value, gradient) in expected.items():
        torch.testing.assert_close(found[name][0].double(), value, rtol=1e-5, atol=1e-6)
        assert found[name][1].isfinite().all()
        assert ((found[name][1] - gradient).abs() <= 1e-5 * (1 + reverse[:, None])).all(), name


def nearly_alike() -> tuple[torch.Tensor, torch.Tensor]:
    z, w = (part.unsqueeze(0) for part in two_models())
    log_p, log_q = (logits.log_softmax(-1).float() for logits in (z, z + 1e-3 * w))
    return full_(log_p, log_q, "jensen_shannon", 0.5, dist.group.WORLD)[0], log_p


def test_jensen_shannon_of_models_that_are_nearly_alike() -> None:
    """A value of 5e-7 nats to a tenth: differences are not lost in logarithms of the mixture."""
    z, w = two_models()
    p, q = z.softmax(-1), (z + 1e-3 * w).softmax(-1)
    m = (p + q) / 2
    expected = ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
    value, _ = run_ranks(1, nearly_alike)[0]
    assert value.item() == pytest.approx(expected.item(), rel=0.1)
