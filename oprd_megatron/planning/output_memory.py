"""What output-space terms keep on a rank besides weights, optimizer and spool: a head, logits and a head's gradient.

    teacher's head        e_T V_local d_T            on the student's last stage all run long, unless the teacher's own is there
    logits                4 n V_local buffers        of n tokens at a time (`logit_buffers`)
    gradient of the head  4 V_local d_S              summed up in fp32 while the logits come and go, and then,
                          for bf16, 6 V_local d_S    without logits: that and its copy in the head's dtype

Logits and gradient exist while a micro-batch is at the end of the student's last stage. Where the teacher's last stage applies
its head it has logits of its own, earlier. Rows of states, masks and a few ids of each token are not counted (a few per cent).

Legend: n tokens of a chunk (`output.chunk_tokens`, or a micro-batch's if that is fewer); V_local head rows on a rank; e_T bytes
of a number of the teacher's; d_T and d_S widths of teacher and student.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import numpy as np

from checkpoints_conversion import Architecture
from oprd_megatron.config.output import OutputConfig, Term
from oprd_megatron.config.schema import RunConfig
from oprd_megatron.parallel.layout import GridLayout
from oprd_megatron.parallel.memory import DTYPE_BYTES, GRADIENT_BYTES, ModelMemory
from oprd_megatron.representation.batch import BatchPlan
from oprd_megatron.representation.outputs import heads_at, output_wire
from oprd_megatron.representation.wire import Wire

LOGIT_BYTES = 4
KEY_TOKENS, KEY_BYTES = 32, 20
"""Tokens whose top set is found at a time, and bytes of a logit's keys meanwhile (vocab_parallel.py)."""
MASK = 0.25
"""A bool for each logit."""


@dataclass(frozen=True)
class OutputPlan:
    """Where the teacher's head is applied, and the format of what travels."""

    head: Literal["student", "teacher"]
    wire: Wire

    @classmethod
    def of(cls, config: RunConfig, teacher: GridLayout, student: GridLayout, architecture: Architecture) -> Self | None:
        """Of a run whose teacher is `architecture`; None without output terms."""
        if not config.output.terms:
            return None
        of_teacher = config.teacher.dtype, architecture.hidden_size
        head = heads_at(config.output, teacher, student, *of_teacher)
        return cls(head, output_wire(config.output.terms, head, *of_teacher))


@dataclass(frozen=True)
class OutputMemory:
    """Bytes of a run's ranks.

    Attributes:
        config: the terms.
        outputs: None without any.
        teacher, student: the models.
        most_tokens: of a micro-batch on a rank whose predictions are compared: (the teacher's, the student's).
    """

    config: OutputConfig
    outputs: OutputPlan | None
    teacher: ModelMemory
    student: ModelMemory
    most_tokens: tuple[int, int]

    def of_rank(self, rank: int) -> int:
        """The most of a rank: its copy of the teacher's head, and the larger of what either model's last stage makes."""
        if self.outputs is None:
            return 0
        on_teacher = self._teacher_step if _is_last(self.teacher.layout, rank) else 0
        on_student = self._student_step if _is_last(self.student.layout, rank) else 0
        return self.teacher_head(rank) + max(on_teacher, on_student)

    def teacher_head(self, rank: int) -> int:
        """Bytes of the teacher's head that a rank holds for the terms, as `final_states.teacher_head` does: 0 where it is the
        teacher's own."""
        teacher, student = self.teacher.layout, self.student.layout
        if self.outputs is None or self.outputs.head == "teacher" or not _is_last(student, rank):
            return 0
        if _is_last(teacher, rank) and teacher.tp == student.tp and teacher.coords(rank).tp == student.coords(rank).tp:
            return 0
        rows = self.student.sharding.vocab_size_padded // student.tp
        return rows * self.teacher.architecture.hidden_size * DTYPE_BYTES[self.teacher.dtype]

    @cached_property
    def _teacher_step(self) -> int:
        """Logits on the teacher's last stage."""
        if self.outputs is None or self.outputs.head == "student":
            return 0
        return self._logits(self.teacher, self.most_tokens[0], with_both=False, summary=True)

    @cached_property
    def _student_step(self) -> int:
        """Logits and the gradient of the head, on the student's last stage."""
        assert self.outputs is not None
        logits = self._logits(
            self.student, self.most_tokens[1], with_both=self.outputs.head == "student", summary=False
        )
        copy = DTYPE_BYTES[self.student.dtype] if self.student.dtype != "fp32" else 0
        numbers = self.student.head_numbers
        return max(logits + GRADIENT_BYTES * numbers, (GRADIENT_BYTES + copy) * numbers)

    def _logits(self, model: ModelMemory, most_tokens: int, *, with_both: bool, summary: bool) -> int:
        tokens, rows = min(self.config.chunk_tokens, most_tokens), model.sharding.vocab_size_padded // model.layout.tp
        buffers, keys = logit_buffers(self.config.terms, with_both=with_both, summary=summary)
        with_keys = 0 if keys is None else LOGIT_BYTES * tokens * keys + KEY_BYTES * min(tokens, KEY_TOKENS)
        return round(rows * max(LOGIT_BYTES * tokens * buffers, with_keys))


def logit_buffers(terms: Sequence[Term], *, with_both: bool, summary: bool) -> tuple[float, int | None]:
    """Most [n, V_local] fp32 buffers at a time in objectives/fused_terms.py, which goes temperature by temperature.

    Args:
        terms: of the run.
        with_both: both models' logits are made: the teacher's head is here.
        summary: the teacher's logits alone are made, without gradients.

    Returns:
        (buffers; buffers while a top set is found, which needs keys besides; None if none is).
    """
    models, gradient, peak = (2 if with_both else 1), 0, 0.0
    few = [term for term in terms if term.kind == "topk" and term.rest == "renormalize"]
    temperatures = sorted({term.temperature for term in terms if term not in few})
    for number, temperature in enumerate(temperatures):
        kept = models if number + 1 < len(temperatures) else 0  # the logits, for later temperatures
        held = kept + models + gradient
        peak = max(peak, held + 1)  # exponentials of one model
        fulls = [term for term in terms if term.kind == "full" and term.temperature == temperature]
        for left, term in zip(reversed(range(len(fulls))), fulls, strict=True):
            own = {"reverse": MASK, "forward": 1 + MASK, "jensen_shannon": 2}[term.divergence]
            peak = max(
                peak, kept + models + gradient + (models if left else 0) + own
            )  # all but the last work on copies
            gradient = 0 if summary else 1
        gradient = 0 if summary else 1
    sets = [term.support for term in terms if term.kind == "topk"]
    of_student = not summary and any(support != "teacher" for support in sets)
    of_teacher = (summary or with_both) and any(support != "student" for support in sets)
    while_found = (
        (models if temperatures else 1) if of_teacher else 1
    )  # the student's are found before the teacher's logits
    return peak, while_found if of_student or of_teacher else None


def _is_last(layout: GridLayout, rank: int) -> bool:
    return rank in layout.ranks and layout.coords(rank).pp == layout.pp - 1


def most_tokens(plan: BatchPlan, side: Literal["teacher", "student"]) -> int:
    """Tokens of a micro-batch on a rank of one model whose predictions are compared, the most of them."""
    most = 0
    for chunk in plan.chunks:
        outputs = chunk.outputs
        tokens = None if outputs is None else outputs.teacher if side == "teacher" else outputs.student
        if tokens is not None:
            ranks = tokens.dp * (tokens.cp.max(initial=0) + 1) + tokens.cp
            blocks = ranks * (tokens.micro_batch.max(initial=0) + 1) + tokens.micro_batch
            most = max(most, int(np.bincount(blocks).max(initial=0)))
    return most
