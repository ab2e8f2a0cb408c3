"""Next-token distributions of both models on held-out answers: KL, cross-entropy, entropies, overlap of their likeliest tokens.

Measured where the student's last stage is, like an output term of the loss, without gradients and a few tokens at a time.
With two tokenizers there is nothing of the teacher's to compare: only what the student alone says.

Legend: P_local tokens of the pack on this rank; N response tokens of a micro-batch on this rank; V_local head rows on this
rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from oprd_megatron.config.output import Term
from oprd_megatron.models import Model, no_output_loss
from oprd_megatron.models.schedule import OnOutput
from oprd_megatron.objectives.final_states import CHUNK_TOKENS, teacher_head
from oprd_megatron.objectives.fused_terms import TeacherHead, output_terms
from oprd_megatron.objectives.output_loss import delivered_rows
from oprd_megatron.objectives.signal import TeacherStates
from oprd_megatron.objectives.vocab_parallel import (
    vocab_parallel_entropy,
    vocab_parallel_gather,
    vocab_parallel_kl,
    vocab_parallel_log_softmax,
    vocab_parallel_overlap,
)
from oprd_megatron.representation.batch import Chunk, Sample
from oprd_megatron.representation.exchange import Delivery
from oprd_megatron.representation.rows import block_rows, selected_rows
from oprd_megatron.representation.wire import Wire

TOP = 16
"""Likeliest tokens of each model whose overlap is measured."""

FIELDS = ("kl", "cross_entropy", "student_entropy", "teacher_entropy", "top_overlap", "tokens")


class SilentTeacher:
    """A signal without anything of the teacher's."""

    wire: Wire | None = None

    def predicted(self, sample: Sample) -> Sequence[int]:
        """All response tokens."""
        return range(len(sample.response_ids))

    def of_teacher(self, chunk: Chunk) -> Callable[[int, torch.Tensor], torch.Tensor]:
        raise AssertionError("nothing travels")


class OutputMeasures:
    """What is measured of outputs over any number of batches.

    Args:
        teacher, student: the models.
        device: of the student's states.
        comparable: both have one vocabulary.
        terms: of the run's loss, measured here too. (Not sampled ones: these answers are not the student's.)

    Attributes:
        signal: for the `StateFlow` that the batches go through.
    """

    def __init__(
        self, teacher: Model, student: Model, device: torch.device, comparable: bool, terms: Sequence[Term] = ()
    ) -> None:
        self.terms = [term for term in terms if term.kind != "sampled"]
        self.student, self.device, self.comparable = student, device, comparable
        self.head = teacher_head(teacher, student) if comparable else None
        self.teacher_layer = teacher.grid.layout.num_layers
        sizes = [model.architecture.vocab_size for model in (teacher, student)]
        self.vocab_size = min(sizes) if comparable else sizes[1]
        self.top = min(TOP, self.vocab_size)
        silent = SilentTeacher()
        self.signal = TeacherStates(teacher, silent.predicted) if comparable else silent
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._sums = torch.zeros(len(self.terms) + len(FIELDS), dtype=torch.float64)

    def on_outputs(self, number: int, chunk: Chunk, delivery: Delivery | None) -> OnOutput:
        """What is called with the student's final states of a chunk. Collective over its tensor-parallel group."""
        outputs, grid = chunk.outputs, self.student.grid
        assert outputs is not None
        blocks = block_rows(outputs.student, outputs.order, grid, self.device)

        def on_output(micro_batch: int, hidden: torch.Tensor) -> torch.Tensor:
            if micro_batch in blocks:
                block, group = blocks[micro_batch], grid.groups.tp
                taught = None
                if delivery is not None:
                    taught = delivered_rows(delivery, self.teacher_layer, micro_batch, block, group, self.device)
                targets = torch.from_numpy(outputs.targets[block.tokens]).to(self.device)
                states = selected_rows(hidden, block, group)
                sums = torch.cat([self._of_terms(states, taught, targets), self._measure(states, taught, targets)])
                if grid.coords.tp == 0:
                    self._sums += sums
            return no_output_loss(micro_batch, hidden)

        return on_output

    def _measure(self, states: torch.Tensor, taught: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
        """Sums of `FIELDS` over [N, D] states of the student and [N, D_T] of the teacher."""
        group, sums = self.student.grid.groups.tp, torch.zeros(len(FIELDS), dtype=torch.float64)
        for start in range(0, len(states), CHUNK_TOKENS):
            some = slice(start, start + CHUNK_TOKENS)
            log_q = vocab_parallel_log_softmax(
                states[some] @ self.student.head_weight.detach().T, self.vocab_size, group
            )
            zero = torch.zeros(len(log_q), device=log_q.device)
            found = [zero, -vocab_parallel_gather(log_q, targets[some], group), vocab_parallel_entropy(log_q, group)]
            if taught is not None and self.head is not None:
                log_p = vocab_parallel_log_softmax(taught[some] @ self.head.T, self.vocab_size, group)
                found[0] = vocab_parallel_kl(log_p, log_q, group)
                found.append(vocab_parallel_entropy(log_p, group))
                found.append(vocab_parallel_overlap(log_p, log_q, self.top, self.vocab_size, group))
            else:
                found += [zero, zero]
            sums += torch.stack(
                [*(values.double().sum() for values in found), zero.new_tensor(len(zero)).double()]
            ).cpu()
        return sums

    def _of_terms(self, states: torch.Tensor, taught: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
        """Sums of the terms' values. They are measured on all tokens."""
        if taught is None or self.head is None or not self.terms:
            return torch.zeros(len(self.terms), dtype=torch.float64)
        _, values = output_terms(
            states, self.student.head_weight.detach(), TeacherHead(taught, self.head), targets, self.terms,
            states.new_zeros(len(self.terms), len(states), dtype=torch.float32), self.vocab_size,
            self.student.grid.groups.tp, CHUNK_TOKENS,
        )  # fmt: skip
        return values.double().sum(1).cpu()

    def record(self) -> dict[str, Any]:
        """Means a token, in nats: `FIELDS` by name, tokens as their number; None for what needs the teacher and has none; and
        "terms" by name. Collective."""
        sums = self._sums.to(self.device)
        dist.all_reduce(sums)
        *totals, tokens = sums.tolist()
        found = [total / tokens for total in totals]
        terms = dict(zip([term.label for term in self.terms], found, strict=False))
        means: dict[str, Any] = dict(zip(FIELDS, found[len(terms) :], strict=False))
        if not self.comparable:
            means |= dict.fromkeys(("kl", "teacher_entropy", "top_overlap"))
        return {**means, "terms": terms, "tokens": int(tokens)}
