"""A weighted sum of output-space terms (OPRD Eq. 2-5) from final states and heads: loss and gradients in chunks of tokens.

    loss = sum_j sum_t weights[j, t] * value_j(p_t, q_t)

A whole [N, V] of logits is a hundred times what a layer keeps. So `output_terms` takes the final states and goes through the
tokens in chunks: logits, values (`divergences.py`) and the gradients of rows and head at once, in forward, and then the chunk's
logits are gone. Backward only scales what forward left (as fused linear cross-entropies do). All terms share the student's
logits, the teacher's, and a log-softmax for each temperature that some term needs one at.

Top-k terms that renormalise need the logits of a few ids only: products of the state with these rows of the head, for both
models by the same steps, and their gradient goes back through these rows alone.

The teacher's numbers come from its final states and its head (`TeacherHead`), or from its own side, where `summarize` has
reduced them to what terms with a small appetite (`reads_few`) ask for (`TeacherSummary`).

Tensor parallelism: each rank has V_local rows of both heads and sees all N rows of states. Its logits give only its share of
d loss / d rows: the sum over ranks is one all-reduce a chunk. The gradient of the rows is so whole and equal on all ranks.

Legend: N supervised rows of this data- and context-parallel rank, n those of a chunk; D, D_T widths of student and teacher; V
vocabulary without padding, V_local head rows on this rank; J terms; m ids of a token that a term compares; C numbers of a
token in a summary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from oprd_megatron.config.output import FullTerm, SampledTerm, Term, TopKTerm
from oprd_megatron.objectives.chunk_logits import LogitGradient, ModelChunk
from oprd_megatron.objectives.divergences import (
    Gradient,
    compared_set,
    full_,
    outcome_log_probs,
    reverse_on_outcomes,
    sampled,
)
from oprd_megatron.objectives.vocab_parallel import vocab_parallel_gather
from oprd_megatron.representation.outputs import summary_width

EXACT_IDS = 2**24
"""Ids below are exact in fp32."""


@dataclass(frozen=True)
class TeacherHead:
    """The teacher's final states [N, D_T] and its head [V_local, D_T], one dtype, sharded like the student's."""

    states: torch.Tensor
    head: torch.Tensor


@dataclass(frozen=True)
class TeacherSummary:
    """What `summarize` made of the teacher's final states, for the same terms: [N, C] fp32."""

    columns: torch.Tensor


def output_terms(
    rows: torch.Tensor,
    head: torch.Tensor,
    teacher: TeacherHead | TeacherSummary,
    targets: torch.Tensor,
    terms: Sequence[Term],
    weights: torch.Tensor,
    vocab_size: int,
    group: dist.ProcessGroup,
    chunk_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and every term's value on every row; at most `chunk_tokens` rows of logits exist at a time.

    Gradients flow to `rows` and to `head`, each only if it requires one and gradients are enabled. Products are taken in the
    dtype of the operands, everything on logits is fp32, the head's gradient is summed over chunks in fp32. What an estimator
    gives as its gradient is said in `divergences.sampled`.

    Args:
        rows: the student's, [N, D], the same on every rank of `group` (`selected_rows`).
        head: the student's [V_local, D], dtype of `rows`.
        teacher: its numbers for the same rows, the same on every rank; a summary serves terms of `reads_few` only.
        targets: y_t, [N] int64.
        terms: J of them.
        weights: [J, N] fp32, the same on every rank: weight x mask / denominator over the global batch. Where all of a
            chunk are 0, a term costs no gradient.
        vocab_size: V, ids that both models have; from here on they are left out.
        group: tensor-parallel group. Collectives, in forward, for each chunk: an all-gather of [n, k] int64 for each model
            whose top k a term asks for (once, for the largest k); two all-reduces of n numbers for each model and
            temperature with a log-softmax; for each model and renormalised top-k term one of [n, m]; for each model and
            top-k term with a tail one of [n, m] and one of n; for each model and sampled term one of n; for each full term
            one of n (jensen_shannon: 2 n); and, if `rows` requires a gradient, one of [n, D] fp32 where a weight is not 0.
            With a summary, none for the teacher. Backward: none.
        chunk_tokens: rows of a chunk.

    Returns:
        (scalar fp32 loss, values [J, N] fp32 in nats, which carry no gradient), whole on every rank. N = 0 gives 0 and zero
        gradients.

    Raises:
        ValueError: a term compares more tokens than there are.
    """
    _check_sizes(terms, vocab_size)
    if isinstance(teacher, TeacherHead):
        assert len(rows) == len(teacher.states), (
            f"{len(rows)} rows of the student, {len(teacher.states)} of the teacher"
        )
        assert len(head) == len(teacher.head), f"heads of {len(head)} and {len(teacher.head)} rows: padded differently"
    else:
        assert teacher.columns.shape == (len(rows), summary_width(terms)), (
            f"a summary of {tuple(teacher.columns.shape)}"
        )
    assert weights.shape == (len(terms), len(rows)), f"weights {tuple(weights.shape)} of {len(terms)} x {len(rows)}"
    work = _Work(teacher, targets, tuple(terms), weights, vocab_size, group, chunk_tokens, torch.is_grad_enabled())
    return _OutputTerms.apply(rows, head, work)


def _check_sizes(terms: Sequence[Term], vocab_size: int) -> None:
    for term in terms:
        if isinstance(term, TopKTerm) and term.k > vocab_size:
            raise ValueError(f"the term {term.label} compares k: {term.k} tokens of {vocab_size}; make k smaller")


@torch.no_grad()
def summarize(
    states: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    terms: Sequence[Term],
    vocab_size: int,
    group: dist.ProcessGroup,
    chunk_tokens: int,
) -> torch.Tensor:
    """What the terms read of the teacher, on the teacher's side (`TeacherSummary`).

    For each term, in order: sampled: log q(y_t). topk with support teacher: k ids, largest logit first, and their logits at the
    term's temperature; with a tail log(q_i / q_rest), from which q_rest follows too.

    Args:
        states: the teacher's final ones, [N, D_T], the same on every rank of `group`.
        head: the teacher's [V_local, D_T], dtype of `states`.
        targets: y_t, [N] int64.
        terms: all of `reads_few`.
        vocab_size: V, as in `output_terms`.
        group: the teacher's tensor-parallel group. Collectives: those that `output_terms` counts for the teacher.
        chunk_tokens: rows whose logits exist at a time.

    Returns:
        [N, C] fp32, whole on every rank, without gradient.

    Raises:
        ValueError: a term compares more tokens than there are.
    """
    _check_sizes(terms, vocab_size)
    columns = states.new_empty(len(states), summary_width(terms), dtype=torch.float32)
    for start in range(0, len(states), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        teacher = ModelChunk(states[chunk], head, vocab_size, group, _top_k(terms, "student"), _temperatures(terms))
        for temperature in (None, *_temperatures(terms)):
            log_q = None if temperature is None else teacher.log_probs(temperature)
            for index in _terms_at(terms, temperature):
                first = summary_width(terms[:index])
                made = _columns(terms[index], teacher, log_q, targets[chunk])
                columns[chunk, first : first + made.size(-1)] = made
        del teacher, log_q  # before the next chunk's logits
    return columns


def _columns(term: Term, teacher: ModelChunk, log_q: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
    """The summary of one term on one chunk, [n, its width] fp32."""
    if isinstance(term, SampledTerm):
        assert log_q is not None
        return vocab_parallel_gather(log_q, targets, teacher.group).unsqueeze(-1)
    assert isinstance(term, TopKTerm) and teacher.vocab_size < EXACT_IDS, "ids are not exact in fp32"
    ids, mask = compared_set("teacher", None, teacher.top(term.k))
    return torch.cat([ids.float(), teacher.outcome_logits(ids, mask, term.temperature, log_q)], dim=-1)


def _terms_at(terms: Sequence[Term], temperature: float | None) -> list[int]:
    """Which terms need a log-softmax at a temperature, or, for None, which need none; the full ones, which write on it, come
    last."""
    indices = [index for index, term in enumerate(terms) if _softmax_temperature(term) == temperature]
    return sorted(indices, key=lambda index: isinstance(terms[index], FullTerm))


def _softmax_temperature(term: Term) -> float | None:
    return None if isinstance(term, TopKTerm) and term.rest == "renormalize" else term.temperature


def _temperatures(terms: Sequence[Term]) -> tuple[float, ...]:
    return tuple(sorted({t for t in map(_softmax_temperature, terms) if t is not None}))


def _top_k(terms: Sequence[Term], other: str) -> int:
    """The largest k of the terms that ask for a model's top set: all but those with the support of the `other`."""
    return max((term.k for term in terms if isinstance(term, TopKTerm) and term.support != other), default=0)


@dataclass(frozen=True)
class _Work:
    """What `_OutputTerms` needs besides the tensors it differentiates; see `output_terms`."""

    teacher: TeacherHead | TeacherSummary
    targets: torch.Tensor
    terms: tuple[Term, ...]
    weights: torch.Tensor
    vocab_size: int
    group: dist.ProcessGroup
    chunk_tokens: int
    has_backward: bool

    def chunk(
        self, chunk: slice, rows: torch.Tensor, head: torch.Tensor, values: torch.Tensor, wanted: Sequence[bool]
    ) -> LogitGradient:
        """Write a chunk's values to `values` [J, N]; the gradient of the terms that are `wanted`."""
        temperatures, total, teacher = _temperatures(self.terms), LogitGradient(), None
        student = ModelChunk(
            rows[chunk], head, self.vocab_size, self.group, _top_k(self.terms, "teacher"), temperatures
        )
        if isinstance(self.teacher, TeacherHead):
            top_k, states = _top_k(self.terms, "student"), self.teacher.states[chunk]
            teacher = ModelChunk(states, self.teacher.head, self.vocab_size, self.group, top_k, temperatures)
        for temperature in (None, *temperatures):
            self._at_temperature(_Models(chunk, student, teacher, temperature), values, wanted, total)
        total.finish(rows.dtype, self.group)
        return total

    def _at_temperature(
        self, models: _Models, values: torch.Tensor, wanted: Sequence[bool], total: LogitGradient
    ) -> None:
        chunk, indices = models.chunk, _terms_at(self.terms, models.temperature)
        for index in indices:
            term = self.terms[index]
            if isinstance(term, FullTerm):
                value, gradient = full_(*models.both(index == indices[-1]), term.divergence, term.mixing, self.group)
            elif isinstance(term, SampledTerm):
                targets = self.targets[chunk]
                log_p = vocab_parallel_gather(models.of_student(), targets, self.group)
                log_q = self._columns(index, models).squeeze(-1)
                value, gradient = sampled(log_p, log_q, targets, term.estimator)
            else:
                value, gradient = self._topk(index, term, models)
            values[index, chunk] = value
            if wanted[index]:
                total.add(gradient, self.weights[index, chunk] / term.temperature)
            del gradient  # before the next term's
        if models.log_p is not None:
            total.end_temperature(models.log_p, has_probs=isinstance(self.terms[indices[-1]], FullTerm))

    def _topk(self, index: int, term: TopKTerm, models: _Models) -> tuple[torch.Tensor, Gradient]:
        if term.support == "teacher":
            found, q = self._columns(index, models).split(term.k, dim=-1)
            ids, mask = compared_set("teacher", None, found.long())
        else:
            assert models.teacher is not None
            ids, mask = compared_set(term.support, models.student.top(term.k), models.teacher.top(term.k))
            q = models.teacher.outcome_logits(ids, mask, term.temperature, models.log_q)
        p = models.student.outcome_logits(ids, mask, term.temperature, models.log_p)
        if term.rest == "tail":
            p, q, mask = pad(p, (0, 1)), pad(q, (0, 1)), pad(mask, (0, 1), value=True)
        return reverse_on_outcomes(outcome_log_probs(p, mask), outcome_log_probs(q, mask), ids)

    def _columns(self, index: int, models: _Models) -> torch.Tensor:
        """The summary of one term, made here or on the teacher's side: [n, its width]."""
        if models.teacher is not None:
            return _columns(self.terms[index], models.teacher, models.log_q, self.targets[models.chunk])
        assert isinstance(self.teacher, TeacherSummary)
        start = summary_width(self.terms[:index])
        return self.teacher.columns[models.chunk, start : summary_width(self.terms[: index + 1])]


class _Models:
    """Both models on one chunk (the teacher, if its head is here) at one temperature, or at None, without log-softmax."""

    def __init__(
        self, chunk: slice, student: ModelChunk, teacher: ModelChunk | None, temperature: float | None
    ) -> None:
        self.chunk, self.student, self.teacher, self.temperature = chunk, student, teacher, temperature
        self.log_p = None if temperature is None else student.log_probs(temperature)
        self.log_q = None if temperature is None or teacher is None else teacher.log_probs(temperature)

    def of_student(self) -> torch.Tensor:
        """[n, V_local] fp32 log-probabilities."""
        assert self.log_p is not None
        return self.log_p

    def both(self, to_write_on: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of both: these ones, or copies if they are still needed."""
        assert self.log_p is not None and self.log_q is not None
        return (self.log_p, self.log_q) if to_write_on else (self.log_p.clone(), self.log_q.clone())


class _OutputTerms(torch.autograd.Function):
    """`output_terms`, where its collectives are counted."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, head: torch.Tensor, work: _Work) -> tuple[torch.Tensor, torch.Tensor]:
        wants = [work.has_backward and needed for needed in ctx.needs_input_grad[:2]]
        by_rows = torch.zeros_like(rows) if wants[0] else None
        by_head = torch.zeros_like(head, dtype=torch.float32) if wants[1] else None
        values = rows.new_empty(len(work.terms), len(rows), dtype=torch.float32)
        starts = range(0, len(rows), work.chunk_tokens)
        for start, wanted in zip(starts, _supervised(work.weights, work.chunk_tokens, any(wants)), strict=False):
            chunk = slice(start, start + work.chunk_tokens)
            gradient = work.chunk(chunk, rows, head, values, wanted)
            if by_rows is not None and (part := gradient.by_rows(head, work.group)) is not None:
                by_rows[chunk] = part
            if by_head is not None:
                gradient.add_to_head(by_head, rows[chunk], work.group)
            del gradient  # before the next chunk's logits
        ctx.save_for_backward(by_rows, None if by_head is None else by_head.to(head.dtype))
        ctx.mark_non_differentiable(values)
        return (work.weights * values).sum(), values

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, gradient: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        # In place: a second [V_local, D] would be the most there is. Autograd refuses a second backward after that.
        by_rows, by_head = (None if saved is None else saved.mul_(gradient) for saved in ctx.saved_tensors)
        return by_rows, by_head, None


def _supervised(weights: torch.Tensor, chunk_tokens: int, has_backward: bool) -> list[list[bool]]:
    """Of each chunk, whether each term has a gradient: a weight that is not 0. One synchronization for all of them."""
    return torch.stack([part.any(-1) & has_backward for part in weights.split(chunk_tokens, dim=-1)]).tolist()
