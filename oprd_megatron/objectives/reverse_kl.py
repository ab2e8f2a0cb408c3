"""Exact reverse KL over the vocabulary (OPD full, Eq. 4), as a training objective on vocabulary-parallel heads.

    loss = weight * sum_t KL(p_t || q_t),        KL(p || q) = sum_v p_v (log p_v - log q_v)
    d KL / d z_v = p_v (log p_v - log q_v - KL)

p is the student (logits z), q the teacher, both at the position that predicts response token t. `weight` holds the global
denominator, like `LossScale.weight`: losses of micro-batches, data- and context-parallel ranks are summed, never averaged.

A whole [N, V] of logits is a hundred times what a layer keeps. So `reverse_kl_rows` takes the final hidden states and the
heads and goes through the tokens in chunks: logits, KL and the gradients of rows and head at once, in forward, and then
the chunk's logits are gone. Backward only scales what forward left (as fused linear cross-entropies do).

Tensor parallelism: each rank has V_local rows of both heads and sees all N rows of hidden states (`selected_rows`). Its
logits give only its share of d loss / d rows: the sum over ranks is one all-reduce a chunk, in `reverse_kl_rows`. The
gradient of the rows is therefore whole and equal on all ranks, and going back to the hidden states adds nothing up.

Legend: P_local tokens of the pack on this rank; N supervised rows of this data- and context-parallel rank, n those of a
chunk; D, D_T widths of student and teacher; V vocabulary without padding; V_local head rows on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from oprd_megatron.objectives.final_states import CHUNK_TOKENS
from oprd_megatron.objectives.vocab_parallel import vocab_parallel_log_softmax
from oprd_megatron.representation.rows import BlockRows, gather_rows


def selected_rows(hidden: torch.Tensor, rows: BlockRows, group: dist.ProcessGroup) -> torch.Tensor:
    """The supervised rows of a micro-batch on every tensor-parallel rank, in the order of `rows.tokens`.

    Backward expects a gradient that is whole and equal on all ranks of `group`. Where hidden states are replicated it is
    passed on as it is, whole on every rank; under sequence parallelism each rank takes its own rows of it.

    Args:
        hidden: [P_local, 1, D], any float dtype; the last stage's output.
        rows: of this micro-batch.
        group: tensor-parallel group. Collectives: under sequence parallelism one all-gather of the rows in forward; else
            none. Backward: none.

    Returns:
        [N, D], dtype of `hidden`, connected to it also for N = 0.
    """
    flat = hidden.flatten(0, 1)
    if rows.replicated:
        return flat.index_select(0, torch.cat(rows.by_rank))
    return GatherSequenceRows.apply(flat.index_select(0, rows.mine), rows.by_rank, group)


class GatherSequenceRows(torch.autograd.Function):
    """`gather_rows`, whose backward keeps this rank's rows of a gradient that is the same on all ranks. (mcore's gather from
    the sequence-parallel region would reduce-scatter, for partial gradients.)

    Forward: one all-gather over the group. Backward: no collectives.
    """

    @staticmethod
    def forward(
        ctx: Any, mine: torch.Tensor, by_rank: tuple[torch.Tensor, ...], group: dist.ProcessGroup
    ) -> torch.Tensor:
        start = sum(len(rows) for rows in by_rank[: group.rank()])
        ctx.own = slice(start, start + len(mine))
        return gather_rows(mine, by_rank, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return gradient[ctx.own], None, None


def reverse_kl_and_gradient(
    logits: torch.Tensor, teacher_log_probs: torch.Tensor, vocab_size: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p || q) per token, and its gradient by the student's logits.

    A token that the student gives no probability (p = 0 in fp32, a padded id, a logit of -inf) adds nothing to either,
    whatever q is there. Where the teacher has q = 0 and the student has not, KL is infinite.

    Args:
        logits: the student's, [n, V_local], any float dtype.
        teacher_log_probs: [n, V_local] fp32, from `vocab_parallel_log_softmax` with the same vocabulary.
        vocab_size: V; ids from here on are left out.
        group: tensor-parallel group. Collectives: three all-reduces of n numbers.

    Returns:
        [n] fp32 in nats, whole on every rank; [n, V_local] fp32, 0 at padded ids.
    """
    difference = vocab_parallel_log_softmax(logits, vocab_size, group)
    probs = difference.exp()
    difference.sub_(teacher_log_probs).masked_fill_(probs == 0, 0.0)
    divergence = (probs * difference).sum(-1)
    dist.all_reduce(divergence, group=group)
    return divergence, difference.sub_(divergence.unsqueeze(-1)).mul_(probs)


def reverse_kl_rows(
    rows: torch.Tensor,
    head: torch.Tensor,
    teacher_rows: torch.Tensor,
    teacher_head: torch.Tensor,
    vocab_size: int,
    group: dist.ProcessGroup,
    weight: float,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight * sum over rows of KL(p || q), from final hidden states and heads; at most `chunk_tokens` rows of logits exist at
    a time.

    Gradients flow to `rows` and to `head`, each only if it requires one and gradients are enabled. Products are taken in
    the dtype of the operands, everything on logits is fp32, the head's gradient is summed over chunks in fp32.

    Args:
        rows: the student's, [N, D], the same on every rank of `group` (`selected_rows`).
        head: the student's [V_local, D], dtype of `rows`.
        teacher_rows: [N, D_T], the same on every rank, in the same order.
        teacher_head: [V_local, D_T], dtype of `teacher_rows`, sharded like `head`.
        vocab_size: V, ids that both models have; from here on they are left out.
        group: tensor-parallel group. Collectives: in forward, for each chunk, five all-reduces of n numbers and, if `rows`
            requires a gradient, one of [n, D] fp32; the loss is whole on every rank. Backward: none.
        weight: coefficient / response tokens of the global batch.
        chunk_tokens: rows of a chunk.

    Returns:
        (scalar fp32 loss, KL of each row [N] fp32 in nats, which carries no gradient). N = 0 gives 0 and zero gradients.
    """
    assert len(rows) == len(teacher_rows), f"{len(rows)} rows of the student, {len(teacher_rows)} of the teacher"
    assert len(head) == len(teacher_head), f"heads of {len(head)} and {len(teacher_head)} rows: padded differently"
    work = _RowWork(teacher_rows, teacher_head, vocab_size, group, weight, chunk_tokens, torch.is_grad_enabled())
    return _ReverseKLRows.apply(rows, head, work)


@dataclass(frozen=True)
class _RowWork:
    """What `_ReverseKLRows` needs besides the tensors it differentiates; see `reverse_kl_rows`."""

    teacher_rows: torch.Tensor
    teacher_head: torch.Tensor
    vocab_size: int
    group: dist.ProcessGroup
    weight: float
    chunk_tokens: int
    has_backward: bool

    def kl_and_gradient(
        self, chunk: slice, rows: torch.Tensor, head: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(KL [n] fp32, weight * d KL / d logits [n, V_local] in the dtype of `rows`) of one chunk."""
        teacher_logits = self.teacher_rows[chunk] @ self.teacher_head.T
        log_q = vocab_parallel_log_softmax(teacher_logits, self.vocab_size, self.group)
        del teacher_logits
        divergence, gradient = reverse_kl_and_gradient(rows[chunk] @ head.T, log_q, self.vocab_size, self.group)
        return divergence, gradient.mul_(self.weight).to(rows.dtype)


class _ReverseKLRows(torch.autograd.Function):
    """`reverse_kl_rows`, where its collectives are counted."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, head: torch.Tensor, work: _RowWork) -> tuple[torch.Tensor, torch.Tensor]:
        by_rows = torch.empty_like(rows) if work.has_backward and ctx.needs_input_grad[0] else None
        by_head = torch.zeros_like(head, dtype=torch.float32) if work.has_backward and ctx.needs_input_grad[1] else None
        divergence = rows.new_empty(len(rows), dtype=torch.float32)
        for start in range(0, len(rows), work.chunk_tokens):
            chunk = slice(start, start + work.chunk_tokens)
            divergence[chunk], by_logits = work.kl_and_gradient(chunk, rows, head)
            if by_rows is not None:
                partial = (by_logits @ head).float()
                dist.all_reduce(partial, group=work.group)
                by_rows[chunk] = partial
            if by_head is not None:
                by_head += by_logits.T @ rows[chunk]
            del by_logits  # before the next chunk's logits
        ctx.save_for_backward(by_rows, None if by_head is None else by_head.to(head.dtype))
        ctx.mark_non_differentiable(divergence)
        return work.weight * divergence.sum(), divergence

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, gradient: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        by_rows, by_head = ctx.saved_tensors
        return None if by_rows is None else by_rows * gradient, None if by_head is None else by_head * gradient, None
