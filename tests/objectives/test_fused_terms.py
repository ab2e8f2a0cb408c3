"""Output terms on final states and heads: values and gradients against plain formulas on whole tensors in float64, on 1, 2 and
4 tensor-parallel ranks, with the teacher's head here or on its own side; and how much memory they take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from oprd_megatron.config.output import FullTerm, SampledTerm, Term, TopKTerm, reads_few
from oprd_megatron.objectives.fused_terms import (
    TeacherHead,
    TeacherSummary,
    output_terms,
    summarize,
)
from oprd_megatron.representation.outputs import summary_width
from tests.live_bytes import LiveBytes
from tests.ranks import run_ranks

WIDTHS = (12, 20)
RELATIVE = 1e-5
"""Of the largest element: fp32 sums in another order, nothing else."""
BF16 = 3e-2
"""Of the largest element: logits near 10 have steps of 1/16 in bfloat16, and most of that averages out."""
ALIKE = 1e-6
"""Nats, where the student is its teacher."""

SAMPLED: list[Term] = [
    SampledTerm(kind="sampled", estimator="policy_gradient"),
    SampledTerm(kind="sampled", estimator="k2", temperature=1.7),
    SampledTerm(kind="sampled", estimator="k3", temperature=2.0),
]
TOP_K: list[Term] = [
    TopKTerm(kind="topk", k=k, support=support, rest=rest, temperature=temperature)
    for support in ("student", "teacher", "intersection", "union")
    for k, rest, temperature in ((4, "renormalize", 1.0), (20, "renormalize", 0.7), (4, "tail", 1.0), (20, "tail", 1.7))
]
FULL: list[Term] = [
    FullTerm(kind="full"),
    FullTerm(kind="full", divergence="reverse", temperature=0.7),
    FullTerm(kind="full", divergence="forward"),
    FullTerm(kind="full", divergence="jensen_shannon"),
    FullTerm(kind="full", divergence="jensen_shannon", mixing=0.1, temperature=1.7),
]
EACH: list[list[Term]] = [[term] for term in (*SAMPLED, *TOP_K, *FULL)]
TOGETHER: list[list[Term]] = [
    [FULL[0], SAMPLED[0], FULL[2], TOP_K[0], FULL[3]],
    [FULL[1], *SAMPLED, *TOP_K, *FULL],
    [*SAMPLED, *TOP_K[4:8]],
    [TOP_K[4], TOP_K[5]],
    [FULL[3], SAMPLED[0]],
    [TOP_K[0], TOP_K[8], TOP_K[13]],
]


@dataclass(frozen=True)
class Case:
    """Tokens, heads and how they are cut.

    Attributes:
        vocab, padded: ids, and rows of the heads over all ranks; rows from `vocab` on are huge.
        alike: the teacher is the student.
        masked: zeros among the weights, whole chunks of them too.
    """

    num_rows: int = 14
    vocab: int = 50
    padded: int = 64
    chunk_tokens: int = 256
    dtype: torch.dtype = torch.float32
    alike: bool = False
    masked: bool = True

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """(rows [N, D], head [padded, D], teacher states [N, D_T], teacher head [padded, D_T], targets [N])."""
        draw, made = torch.Generator().manual_seed(5), []
        for width in WIDTHS:
            head = 0.7 * torch.randn(self.padded, width, generator=draw)
            head[self.vocab :] = 1e3
            made += [torch.randn(self.num_rows, width, generator=draw), head]
        made = [tensor.to(self.dtype) for tensor in (made[:2] * 2 if self.alike else made)]
        return *made, torch.randint(0, self.vocab, (self.num_rows,), generator=draw)

    def weights(self, num_terms: int) -> torch.Tensor:
        """[J, N]: each term its own; the last tokens belong to the last term alone."""
        draw = torch.Generator().manual_seed(6)
        weights = torch.rand(num_terms, self.num_rows, generator=draw) + 0.1
        if self.masked:
            weights *= torch.rand(num_terms, self.num_rows, generator=draw) > 0.3
            weights[:-1, 8:] = 0.0
        return weights


def on_shards(case: Case, groups: list[list[Term]]) -> list[dict[str, dict[str, torch.Tensor]]]:
    """For each group of terms {how the teacher comes: loss, values and this rank's gradients}; backward starts from 2."""
    return [
        {
            kind: one_run(case, terms, kind)
            for kind in (("head", "summary") if all(map(reads_few, terms)) else ("head",))
        }
        for terms in groups
    ]


def one_run(case: Case, terms: list[Term], kind: str) -> dict[str, torch.Tensor]:
    group = dist.group.WORLD
    rows, head, states, teacher_head, targets = case.tensors()
    rows, head, teacher_head = (
        rows.clone().requires_grad_(),
        head.chunk(group.size())[group.rank()].clone().requires_grad_(),
        teacher_head.chunk(group.size())[group.rank()].clone(),
    )
    teacher: Any = TeacherHead(states, teacher_head)
    if kind == "summary":
        columns = summarize(states, teacher_head, targets, terms, case.vocab, group, 5)
        assert columns.shape == (case.num_rows, summary_width(terms)) and columns.dtype == torch.float32
        teacher = TeacherSummary(columns)
    weights = case.weights(len(terms))
    loss, values = output_terms(rows, head, teacher, targets, terms, weights, case.vocab, group, case.chunk_tokens)
    assert not values.requires_grad and loss.dtype == values.dtype == torch.float32
    (2 * loss).backward()
    return {"loss": loss.detach(), "values": values, "rows": rows.grad, "head": head.grad}


def formula(term: Term, z: torch.Tensor, w: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(value, what to differentiate) of one token from its logits [V], as the definitions say it."""
    log_p, log_q = (z / term.temperature).log_softmax(-1), (w / term.temperature).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if isinstance(term, SampledTerm):
        ratio = (log_p - log_q)[targets]
        if term.estimator == "policy_gradient":
            return ratio, ratio.detach() * log_p[targets]
        value = ratio**2 / 2 if term.estimator == "k2" else (q / p)[targets] - 1 + ratio
        return value, value
    if isinstance(term, FullTerm):
        a, m = term.mixing, term.mixing * p + (1 - term.mixing) * q
        value = {
            "reverse": lambda: (p * (p / q).log()).sum(),
            "forward": lambda: (q * (q / p).log()).sum(),
            "jensen_shannon": lambda: a * (p * (p / m).log()).sum() + (1 - a) * (q * (q / m).log()).sum(),
        }[term.divergence]()
        return value, value
    sets = [set(logits.topk(term.k).indices.tolist()) for logits in (z, w)]
    chosen = {"student": sets[0], "teacher": sets[1], "union": sets[0] | sets[1], "intersection": sets[0] & sets[1]}
    ids = torch.tensor(sorted(chosen[term.support]), dtype=torch.int64)
    p, q = p[ids], q[ids]
    if term.rest == "tail":
        p, q = (torch.cat([part, 1 - part.sum(0, keepdim=True)]) for part in (p, q))
    elif len(ids):
        p, q = p / p.sum(), q / q.sum()
    value = (p * (p / q).log()).sum() + 0 * z.sum()
    return value, value


def reference(case: Case, terms: list[Term]) -> dict[str, torch.Tensor]:
    rows, head, states, teacher_head, targets = case.tensors()
    rows, head = rows.double().requires_grad_(), head.double().requires_grad_()
    z, w = rows @ head[: case.vocab].T, states.double() @ teacher_head[: case.vocab].double().T
    found = [[formula(term, *token) for token in zip(z, w, targets, strict=True)] for term in terms]
    values = torch.tensor([[value.item() for value, _ in of_term] for of_term in found]).view(len(terms), len(rows))
    weights = case.weights(len(terms)).double()
    loss = 2 * sum(
        (weights[j, t] * found[j][t][1] for j in range(len(terms)) for t in range(len(rows))), 0 * rows.sum()
    )
    (loss + 0 * head[: case.vocab].sum()).backward()
    return {"loss": (weights * values).sum(), "values": values, "rows": rows.grad, "head": head.grad}


def check(case: Case, tp: int, groups: list[list[Term]], relative: float = RELATIVE) -> None:
    ranks = run_ranks(tp, on_shards, case, groups)
    for index, terms in enumerate(groups):
        expected = reference(case, terms)
        for kind in ranks[0][index]:
            found = [("head", torch.cat([rank[index][kind]["head"] for rank in ranks]))]
            found += [(name, rank[index][kind][name]) for rank in ranks for name in ("loss", "values", "rows")]
            for name, tensor in found:
                largest = max([*expected[name].abs().flatten().tolist(), 0.1])  # a nat of a small sum is not more exact
                error = (tensor.double() - expected[name]).abs().flatten().tolist()
                assert tensor.shape == expected[name].shape
                assert max([*error, 0.0]) <= relative * largest, (terms, kind, name, max(error) / largest)
            assert not found[0][1][case.vocab :].any()
            assert all(torch.equal(rank[index][kind]["values"], ranks[0][index][kind]["values"]) for rank in ranks)


@pytest.mark.parametrize("vocab", [64, 34])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_each_term_equals_its_formula(tp: int, vocab: int) -> None:
    """Every term, from the teacher's head and, where few numbers do, from a summary; with top sets larger than a shard, and one
    vocabulary of which a whole shard is padding."""
    check(Case(vocab=vocab), tp, EACH)


@pytest.mark.parametrize("tp", [1, 4])
def test_terms_together(tp: int) -> None:
    """Sums with different weights, masks and temperatures: terms do not write on what others read."""
    check(Case(chunk_tokens=4), tp, TOGETHER)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 14])
def test_chunks_change_nothing(chunk_tokens: int) -> None:
    """Chunks of one token, without a rest, and all at once; of tokens that no term, or one of them, supervises."""
    check(Case(chunk_tokens=chunk_tokens), 1, [[FULL[0]], [SAMPLED[0], TOP_K[0]], [TOP_K[4], TOP_K[6]]])


@pytest.mark.parametrize("tp", [1, 2])
def test_no_rows(tp: int) -> None:
    """N = 0: the loss and all gradients are 0."""
    check(Case(num_rows=0), tp, [*EACH[:6], EACH[-1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_student_that_is_its_teacher(dtype: torch.dtype) -> None:
    """Every value is 0 on every token, and so are the gradients; both sides take the same steps on the same numbers."""
    ranks = run_ranks(2, on_shards, Case(alike=True, dtype=dtype, chunk_tokens=5, masked=False), EACH)
    for terms, found in zip(EACH, ranks[0], strict=True):
        for kind, tensors in found.items():
            assert tensors["values"].abs().max() <= ALIKE, (terms, kind)
            assert tensors["rows"].abs().max() <= 10 * ALIKE and tensors["head"].abs().max() <= 10 * ALIKE, (
                terms,
                kind,
            )


@pytest.mark.parametrize("tp", [1, 2])
def test_bf16(tp: int) -> None:
    """Gradients come in the dtype of the tensors and are those of the rounded states and heads. (Top sets are not compared:
    rounded logits have other ones.)"""
    case = Case(dtype=torch.bfloat16, chunk_tokens=5)
    check(case, tp, [[SAMPLED[0]], [FULL[0]], [FULL[2], FULL[4]]], BF16)
    case = Case(dtype=torch.bfloat16, chunk_tokens=5, masked=False)
    for term, found in zip(TOP_K, run_ranks(tp, on_shards, case, [[term] for term in TOP_K])[0], strict=True):
        for tensors in found.values():
            assert tensors["rows"].dtype == tensors["head"].dtype == torch.bfloat16
            assert all(tensor.isfinite().all() for tensor in tensors.values())
            assert tensors["rows"].any() and tensors["head"].any(), term


def test_bf16_with_a_long_head() -> None:
    """More rows of the head than are multiplied at a time."""
    case = Case(vocab=16400, padded=16410, num_rows=3, dtype=torch.bfloat16, masked=False)
    check(case, 1, [[FULL[0], SAMPLED[0]]], BF16)


def on_repeated_row(count: int, term: Term) -> torch.Tensor:
    case = Case(dtype=torch.bfloat16)
    rows, head, states, teacher_head, targets = case.tensors()
    rows, states, targets = (tensor[3:4].expand(count, *tensor.shape[1:]) for tensor in (rows, states, targets))
    weights, teacher = torch.full((1, count), 0.5), TeacherHead(states, teacher_head)
    output_terms(rows, head.requires_grad_(), teacher, targets, [term], weights, 50, dist.group.WORLD, 1)[0].backward()
    return head.grad


@pytest.mark.parametrize("term", [FULL[0], TOP_K[0]], ids=["dense", "sparse"])
def test_the_gradient_of_the_head_is_summed_in_fp32(term: Term) -> None:
    """512 equal chunks give 512 times the gradient of one; in bfloat16 the sum would stand still at 256 times."""
    once, often = (run_ranks(1, on_repeated_row, count, term)[0] for count in (1, 512))
    torch.testing.assert_close(often, 512 * once, rtol=1e-2, atol=0)


def without_gradients(terms: list[Term]) -> None:
    case, group = Case(), dist.group.WORLD
    rows, head, states, teacher_head, targets = case.tensors()
    rest = (TeacherHead(states, teacher_head), targets, terms, case.weights(len(terms)), case.vocab, group, 5)
    expected, _ = output_terms(rows, head, *rest)
    rows.requires_grad_()
    loss, _ = output_terms(rows, head, *rest)
    loss.backward()
    assert loss == expected and rows.grad.any() and head.grad is None
    head.requires_grad_()
    with torch.no_grad():
        assert not output_terms(rows, head, *rest)[0].requires_grad
    loss, _ = output_terms(rows.detach(), head, *rest)
    loss.backward()
    assert loss == expected and head.grad.any()


def test_only_the_gradients_that_are_asked_for() -> None:
    """A frozen head, frozen rows, and no gradients at all."""
    run_ranks(1, without_gradients, TOGETHER[0])


def test_what_does_not_fit_is_refused() -> None:
    """Top sets larger than the vocabulary; heads padded differently; a summary of other terms."""
    rows, head, targets, term = torch.ones(1, 2), torch.ones(8, 2), torch.zeros(1, dtype=torch.int64), TOP_K[4]
    rest = (targets, [term], torch.ones(1, 1))
    with pytest.raises(ValueError, match="topk compares k: 4 tokens of 3"):
        output_terms(rows, head, TeacherHead(rows, head), *rest, 3, None, 4)
    with pytest.raises(AssertionError, match="padded differently"):
        output_terms(rows, head, TeacherHead(rows, head[:6]), *rest, 5, None, 4)
    with pytest.raises(AssertionError, match="a summary of"):
        output_terms(rows, head, TeacherSummary(torch.ones(1, 7)), *rest, 5, None, 4)
    with pytest.raises(AssertionError, match="whole distribution"):
        summary_width([FULL[0]])


def peak(num_rows: int, width: int, vocab: int, padded: int, chunk_tokens: int, terms: list[Term], kind: str) -> int:
    """Most bytes alive in forward besides inputs and what forward leaves."""
    group, live = dist.group.WORLD, LiveBytes()
    rows, head = torch.randn(num_rows, width), torch.randn(padded, width)
    targets, weights = torch.zeros(num_rows, dtype=torch.int64), torch.ones(len(terms), num_rows)
    teacher: Any = TeacherHead(rows.clone(), head.clone())
    if kind == "summary":
        teacher = TeacherSummary(summarize(teacher.states, teacher.head, targets, terms, vocab, group, chunk_tokens))
    rows.requires_grad_(), head.requires_grad_()
    with live:
        loss, values = output_terms(rows, head, teacher, targets, terms, weights, vocab, group, chunk_tokens)
    left = 4 * (rows.numel() + head.numel() + values.numel() + loss.numel())
    assert live.live == left, "kept for backward"
    return live.peak - left


def test_the_real_vocabulary_takes_the_same_for_any_number_of_rows() -> None:
    """Full KL at 151,936 ids: three rows of logits a token of the chunk (both models' and one temporary) and a mask, for 512
    rows and for 2,048."""
    peaks = [run_ranks(1, peak, num_rows, 32, 151936, 152064, 64, [FULL[0]], "head")[0] for num_rows in (512, 2048)]
    assert abs(peaks[0] - peaks[1]) <= 0.001 * peaks[0], peaks
    assert max(peaks) <= 3.3 * 4 * 64 * 152064


@pytest.mark.parametrize(
    ("terms", "kind", "most"),
    [
        ([TOP_K[0]], "head", 1.4),  # the student's logits, and keys of its top set
        ([TOP_K[4]], "head", 1.4),  # the teacher's
        ([TOP_K[4]], "summary", 0.2),  # nothing as long as the vocabulary
        ([SAMPLED[0]], "summary", 2.2),
        ([FULL[2]], "head", 3.4),
        ([FULL[3]], "head", 4.2),
        ([FULL[0], SAMPLED[0], TOP_K[6], TOP_K[4]], "head", 3.4),  # no copies: the full term is the last to read
        (SAMPLED, "head", 6.2),  # both models' logits, and at three temperatures in turn both log-softmaxes
    ],
)
def test_rows_of_logits(terms: list[Term], kind: str, most: float) -> None:
    """In units of a chunk's logits: renormalised top-k terms make one model's and no gradient of their size, or none at all."""
    found = run_ranks(1, peak, 1024, 4, 4000, 4096, 512, terms, kind)[0] / (4 * 512 * 4096)
    assert found <= most, found


@pytest.mark.parametrize("term", [FULL[0], TOP_K[0], TOP_K[4]], ids=["full", "student", "teacher"])
def test_one_gradient_of_the_head(term: Term) -> None:
    """A head 32 times as large as a chunk's logits: its gradient is added to in place, whatever the term."""
    assert run_ranks(1, peak, 64, 512, 4000, 4096, 16, [term], "head")[0] <= 9 * (4 * 16 * 4096)
