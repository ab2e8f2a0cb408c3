"""Output-space terms (OPRD Eq. 2-5) on one chunk of tokens: values in nats, gradients by the student's logits in closed form.

p is the student's distribution, q the teacher's, z the student's logits, y the token that was sampled. Under a temperature z is
logits / temperature, p and q its softmax. A token's gradient is a sum of up to three parts (`Gradient`), so that only the exact
divergences need a row of V numbers of their own:

    d value / d z_v  =  dense_v  +  of_probs * p_v  +  (at_ids where v is one of `ids`)

What the student gives no probability (p = 0 in fp32, a padded id, a logit of -inf) adds nothing, whatever q is there.

Legend: n tokens of the chunk; V vocabulary, V_local rows of the head on this rank; k ids of a model's top set, m ids that a
token's models are compared on (k, or 2 k of a union); o outcomes (m, or m + 1 with a rest).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from oprd_megatron.objectives.vocab_parallel import is_among, local_ids

SMALLEST_REST = 1e-38
"""Floor of the probability outside of a set, whose logarithm is taken."""
FURTHEST = 80.0
"""Log-ratios of Jensen-Shannon are cut here: where q is e^80 times p, p times any log-ratio adds nothing, and vice versa."""
LARGEST_RATIO = 40.0
"""Log of the largest q / p in k3, which a token that the student sampled never has; its square is finite in fp32."""


@dataclass(frozen=True)
class Gradient:
    """d value / d logits of n tokens, as parts to add up; see the module.

    Attributes:
        dense: [n, V_local] fp32, or None.
        of_probs: [n] fp32, a factor on the student's probabilities, or None.
        ids: [n, m] int64, global, different from each other where `at_ids` is not 0; or None.
        at_ids: [n, m] fp32.
    """

    dense: torch.Tensor | None = None
    of_probs: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    at_ids: torch.Tensor | None = None


def sampled(
    log_p: torch.Tensor,
    log_q: torch.Tensor,
    targets: torch.Tensor,
    estimator: Literal["policy_gradient", "k2", "k3"],
) -> tuple[torch.Tensor, Gradient]:
    """One-sample estimates from y (Eq. 3). All have the form `slope * d log p(y) / d z`, with r = log p(y) - log q(y):

    | estimator | value | slope | mean of the gradient over y ~ p |
    |---|---|---|---|
    | policy_gradient | r | r, held constant | that of KL(p || q): unbiased for reverse KL |
    | k2 | r^2 / 2 | r | that of KL(p || q): unbiased for reverse KL |
    | k3 | q/p - 1 + r | 1 - q/p | that of KL(q \\|\\| p): forward KL's, though the value is an estimate of reverse KL |

    The value of policy_gradient is not what is differentiated: the gradient of r itself has mean 0.

    Args:
        log_p, log_q: [n] fp32, at y. Where log p is -inf, r counts as 0.
        targets: y, [n] int64.
        estimator: which.

    Returns:
        [n] fp32; gradient, d log p(y) / d z_v = 1[v = y] - p_v. Collectives: none.
    """
    ratio = (log_p - log_q).masked_fill_(log_p.isneginf(), 0.0)
    if estimator == "policy_gradient":
        value, slope = ratio, ratio
    elif estimator == "k2":
        value, slope = ratio.square() / 2, ratio
    else:
        excess = ratio.neg().clamp_(max=LARGEST_RATIO).expm1_()  # q/p - 1
        value, slope = excess + ratio, -excess
    return value, Gradient(of_probs=-slope, ids=targets.unsqueeze(-1), at_ids=slope.unsqueeze(-1))


def compared_set(
    support: Literal["student", "teacher", "intersection", "union"],
    student_ids: torch.Tensor | None,
    teacher_ids: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids that a top-k term compares (Eq. 5). The set is a constant: nothing is differentiated through the choice.

    Args:
        support: whose.
        student_ids, teacher_ids: top sets [n, k] int64; the ones that `support` does not name are not read.

    Returns:
        (ids [n, m] int64, whether an id is in the set [n, m] bool). Collectives: none.
    """
    if support in ("student", "teacher"):
        ids = student_ids if support == "student" else teacher_ids
        assert ids is not None
        return ids, torch.ones_like(ids, dtype=torch.bool)
    assert student_ids is not None and teacher_ids is not None
    if support == "intersection":
        return student_ids, is_among(student_ids, teacher_ids)
    ids = torch.cat([student_ids, teacher_ids], dim=-1)
    return ids, torch.cat([torch.ones_like(student_ids, dtype=torch.bool), ~is_among(teacher_ids, student_ids)], dim=-1)


def outcome_log_probs(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [n, o] fp32 among the outcomes of `mask`, from logits [n, o]; -inf elsewhere, also where the mask is
    empty or all logits are -inf. Collectives: none."""
    logits = logits.masked_fill(~mask, -torch.inf)
    total = logits.logsumexp(-1, keepdim=True)
    return logits.sub_(total.masked_fill_(total.isneginf(), 0.0))


def odds_of_rest(
    log_probs: torch.Tensor, at_ids: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """log(p_i / rest), where the rest is the probability outside of the set: logits of the set's ids beside a logit of 0 for
    the rest. The rest is summed up, not taken from 1, so that it is right also where it is a billionth.

    Args:
        log_probs: shard [n, V_local] fp32 of log-probabilities.
        at_ids: what they are at the ids, [n, m] fp32 (`vocab_parallel_gather`).
        ids, mask: the set (`compared_set`).
        group: tensor-parallel group. Collectives: one all-reduce of n numbers.

    Returns:
        [n, m] fp32; finite unless p_i is 0.
    """
    probs = log_probs.exp()
    local, here = local_ids(ids, probs.size(-1), group)
    probs.scatter_add_(-1, local, probs.gather(-1, local).neg_().masked_fill_(~(here & mask), 0.0))  # x - x is 0
    rest = probs.sum(-1, keepdim=True)
    dist.all_reduce(rest, group=group)
    return at_ids - rest.clamp_(min=SMALLEST_REST).log_()


def reverse_on_outcomes(log_p: torch.Tensor, log_q: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, Gradient]:
    """KL(p || q) over few outcomes: the ids of a set, each distribution within it (Eq. 5), or those and the rest as one more.

        renormalised: d KL / d z_i = p_i (d_i - KL),                    d_i = log p_i - log q_i, and 0 outside of the set
        with a rest:  d KL / d z_v = p_v (d_rest - KL) + p_i (d_i - d_rest) where v is an id i of the set

    A renormalised set of fewer than two ids has value and gradient 0.

    Args:
        log_p, log_q: [n, o] fp32 from `outcome_log_probs`, the same mask; the rest, if any, last.
        ids: [n, m] int64; o = m, or m + 1 with a rest.

    Returns:
        [n] fp32; gradient: sparse, and with a rest a factor on p. Collectives: none.
    """
    probs = log_p.exp()
    difference = (log_p - log_q).masked_fill_(probs == 0, 0.0)
    value = (probs * difference).sum(-1)
    if log_p.size(-1) == ids.size(-1):
        return value, Gradient(ids=ids, at_ids=difference.sub_(value.unsqueeze(-1)).mul_(probs))
    inside, rest = difference[:, :-1], difference[:, -1]
    return value, Gradient(of_probs=rest - value, ids=ids, at_ids=(inside - rest.unsqueeze(-1)).mul_(probs[:, :-1]))


def full_(
    log_p: torch.Tensor,
    log_q: torch.Tensor,
    divergence: Literal["reverse", "forward", "jensen_shannon"],
    mixing: float,
    group: dist.ProcessGroup,
) -> tuple[torch.Tensor, Gradient]:
    """Exact divergence over the vocabulary (Eq. 4). Writes on its arguments: `log_p` is p afterwards, `log_q` nothing of use.

    Args:
        log_p, log_q: shards [n, V_local] fp32 of log-probabilities of the same vocabulary.
        divergence: which; see the functions below.
        mixing: of jensen_shannon.
        group: tensor-parallel group. Collectives: one all-reduce of n numbers (jensen_shannon: of 2 n).

    Returns:
        [n] fp32, whole on every rank; dense gradient, 0 at padded ids.
    """
    if divergence == "reverse":
        return _reverse_(log_p, log_q, group)
    if divergence == "forward":
        return _forward_(log_p, log_q, group)
    return _jensen_shannon_(log_p, log_q, mixing, group)


def _reverse_(log_p: torch.Tensor, log_q: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, Gradient]:
    """KL(p || q) = sum_v p_v d_v with d = log p - log q;  d KL / d z_v = p_v d_v - KL p_v. Infinite where q = 0 and p > 0."""
    share = torch.sub(log_p, log_q, out=log_q)
    probs = log_p.exp_()
    share.masked_fill_(probs == 0, 0.0).mul_(probs)
    value = share.sum(-1)
    dist.all_reduce(value, group=group)
    return value, Gradient(dense=share.addcmul_(probs, value.unsqueeze(-1), value=-1.0))


def _forward_(log_p: torch.Tensor, log_q: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, Gradient]:
    """KL(q || p) = sum_v q_v (log q_v - log p_v);  d KL / d z_v = p_v - q_v. Infinite where log p = -inf and q > 0."""
    share = log_q - log_p
    q = log_q.exp_()
    value = share.masked_fill_(q == 0, 0.0).mul_(q).sum(-1)
    dist.all_reduce(value, group=group)
    return value, Gradient(dense=torch.sub(log_p.exp_(), q, out=q))


def _jensen_shannon_(
    log_p: torch.Tensor, log_q: torch.Tensor, mixing: float, group: dist.ProcessGroup
) -> tuple[torch.Tensor, Gradient]:
    """a KL(p || m) + (1 - a) KL(q || m) with m = a p + (1 - a) q and a = mixing;
    d / d z_v = a p_v (log(p_v / m_v) - KL(p || m)).

    With x = log q - log p: log(m / p) = log(1 + (1 - a) (e^x - 1)) and log(m / q) = log(1 + a (e^-x - 1)), exact also where p
    and q are nearly the same."""
    ratio = (log_q - log_p).nan_to_num_(0.0, FURTHEST, -FURTHEST).clamp_(-FURTHEST, FURTHEST)
    p, q = log_p.exp_(), log_q.exp_()
    to_p = ratio.expm1().mul_(1 - mixing).log1p_().mul_(p)  # p log(m / p)
    to_q = ratio.neg_().expm1_().mul_(mixing).log1p_().mul_(q)
    shares = torch.stack([to_p.sum(-1), to_q.sum(-1)]).neg_()
    dist.all_reduce(shares, group=group)
    value = mixing * shares[0] + (1 - mixing) * shares[1]
    return value, Gradient(dense=to_p.addcmul_(p, shares[0].unsqueeze(-1)).mul_(-mixing))
