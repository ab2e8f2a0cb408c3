"""OPD in a training step (OPRD Eq. 4 and 7): exact reverse KL over the vocabulary at the positions that predict response
tokens, beside the representation loss or instead of it. One teacher forward serves both.

The teacher's final states travel to the student's last stage (D_T numbers a token, not V) and meet the teacher's head there.
Both models have to live on the same ranks: between disjoint ones the states of the next chunk are already on their way while
these would have to be exchanged.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from oprd_megatron.models import Model, no_output_loss
from oprd_megatron.models.schedule import OnOutput
from oprd_megatron.objectives.final_states import TeacherFinals, teacher_head
from oprd_megatron.objectives.reverse_kl import reverse_kl_rows, selected_rows
from oprd_megatron.representation.batch import BatchPlan
from oprd_megatron.representation.flow import Passes
from oprd_megatron.representation.rows import BlockRows, block_rows


class OPD:
    """The output-space term of a run.

    Args:
        teacher, student: on the same ranks, with one tokenizer.
        coefficient: factor on the mean KL over the response tokens of the global batch.
        device: of the student's states.
    """

    def __init__(self, teacher: Model, student: Model, coefficient: float, device: torch.device) -> None:
        self.teacher, self.student, self.coefficient, self.device = teacher, student, coefficient, device
        self.head = teacher_head(teacher, student)
        self.vocab_size = min(teacher.architecture.vocab_size, student.architecture.vocab_size)

    def of_batch(self, plan: BatchPlan) -> OPDBatch:
        """The term of one batch."""
        return OPDBatch(self, plan)


class OPDBatch:
    """Callbacks for the two models' passes over one batch.

    Attributes:
        on_teacher_output, on_student_output: for each chunk, for the schedules.
    """

    def __init__(self, term: OPD, plan: BatchPlan) -> None:
        self.term, student = term, term.student
        self.num_tokens = sum(len(sample.response_ids) for sample in plan.samples)
        self.weight = term.coefficient / self.num_tokens
        self.finals = [TeacherFinals(term.teacher, student, chunk, term.device) for chunk in plan.chunks]
        self.on_teacher_output = [finals.on_output for finals in self.finals]
        self.on_student_output: list[OnOutput] = [self._on_output] * len(self.finals)
        self._blocks: dict[int, BlockRows] = {}
        self._targets: dict[int, torch.Tensor] = {}
        self._total = torch.zeros((), dtype=torch.float64)

    def join(self, passes: Passes) -> Passes:
        """The same passes with this term's callbacks."""
        return replace(
            passes,
            on_teacher_output=self.on_teacher_output,
            on_student_output=self.on_student_output,
            between=self.between,
        )

    def between(self, number: int) -> None:
        """Bring a chunk's teacher states to where the student's heads are. Collective."""
        finals = self.finals[number]
        states = finals.states()
        if states is not None:
            self._blocks = block_rows(finals.tokens, finals.route.order, finals.grid, self.term.device)
            parts = states.split([len(rows.tokens) for rows in self._blocks.values()])
            self._targets = dict(zip(self._blocks, parts, strict=True))

    def _on_output(self, micro_batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """The loss of a micro-batch from its final states [P_local, 1, D]."""
        if micro_batch not in self._blocks:
            return no_output_loss(micro_batch, hidden)
        student, head = self.term.student, self.term.head
        assert head is not None
        group = student.grid.groups.tp
        rows = selected_rows(hidden, self._blocks[micro_batch], group)
        loss, kl = reverse_kl_rows(
            rows, student.head_weight, self._targets.pop(micro_batch), head, self.term.vocab_size, group, self.weight
        )
        if student.grid.coords.tp == 0:
            self._total += kl.double().sum().cpu()
        return loss

    def mean_kl(self) -> float:
        """KL(student || teacher) in nats a response token, over the global batch. Collective."""
        total = self._total.to(self.term.device)
        dist.all_reduce(total)
        return float(total) / self.num_tokens
