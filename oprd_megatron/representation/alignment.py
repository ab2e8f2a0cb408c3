"""One batch through the method: teacher states, exchange, the student's loss. The trainer and the evaluation both use it.

plan    = alignment.plan(samples)
targets = alignment.exchange(plan, alignment.teacher_states(plan))
report  = alignment.student_pass(plan, targets, train=True)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.models import Model, no_output_loss, run_schedule
from oprd_megatron.models.schedule import OnOutput
from oprd_megatron.platform import Platform
from oprd_megatron.representation.batch import BatchPlan, Sample, plan_batch, token_blocks
from oprd_megatron.representation.exchange import Outbox, Targets, exchange
from oprd_megatron.representation.injection import Aligner
from oprd_megatron.representation.layer_map import resolve_layer_pairs
from oprd_megatron.representation.loss import ALIGNMENT_FIELDS, LossScale
from oprd_megatron.representation.route import planned_bytes
from oprd_megatron.representation.taps import attach_taps


@dataclass(frozen=True)
class AlignmentReport:
    """Averages over the supervised tokens of a global batch, the same on every rank. Lists follow `student_layers`.

    Attributes:
        loss: Eq. 6 with its coefficient.
        student_layers, teacher_layers: the supervised pairs (1-based).
        layer_loss: each layer's own mean loss term, without the coefficient.
        mse: raw mean squared difference per width.
        cosine: cosine of student and teacher state.
        norm_ratio: |h_S| / |h_T|.
    """

    loss: float
    student_layers: list[int]
    teacher_layers: list[int]
    layer_loss: list[float]
    mse: list[float]
    cosine: list[float]
    norm_ratio: list[float]

    @property
    def mean_cosine(self) -> float:
        return sum(self.cosine) / len(self.cosine)


class Alignment:
    """The representation loss between a frozen teacher and a student, whatever their layouts.

    Args:
        teacher, student: the models; their widths must be equal.
        config: what is aligned.
        platform: of this run.
        micro_batch_size: rollouts in one forward pass.
    """

    def __init__(
        self, teacher: Model, student: Model, config: DistillConfig, platform: Platform, micro_batch_size: int
    ) -> None:
        self.teacher, self.student, self.config, self.platform = teacher, student, config, platform
        self.micro_batch_size = micro_batch_size
        self.pairs = resolve_layer_pairs(config, student.architecture.num_layers, teacher.architecture.num_layers)
        self.width = teacher.architecture.hidden_size
        self.wire_dtype = teacher.config.params_dtype

    def plan(self, samples: Sequence[Sample]) -> BatchPlan:
        """Arrange and route a global batch."""
        layouts = self.teacher.grid.layout, self.student.grid.layout
        return plan_batch(samples, self.pairs, *layouts, self.config, self.micro_batch_size)

    def teacher_states(self, plan: BatchPlan, on_output: OnOutput = no_output_loss) -> Outbox:
        """The teacher's forward over its micro-batches; supervised rows only are kept. No LM head is called; `on_output`
        sees the last stage's final hidden states."""
        outbox = Outbox(
            plan.transfers,
            plan.teacher.tokens,
            dist.get_rank(),
            width=self.width,
            dtype=self.wire_dtype,
            device=self.platform.device,
        )
        layers = {pair.teacher_layer for pair in self.pairs}
        taps = attach_taps(self.teacher, layers, self.config.final_state, outbox.put)
        blocks = token_blocks(plan.samples, plan.teacher.arrangement, self.teacher.grid.coords.dp)
        try:
            run_schedule(self.teacher, self.platform, blocks, forward_only=True, on_output=on_output)
        finally:
            for tap in taps:
                tap.remove()
        return outbox

    def exchange(self, plan: BatchPlan, outbox: Outbox) -> tuple[Targets, int]:
        """Send the states where they are needed. Returns this rank's targets and the bytes it sent."""
        return exchange(outbox, plan.student.tokens)

    def exchanged_bytes(self, plan: BatchPlan) -> int:
        """Bytes that the exchange moves between ranks, over the whole world."""
        return sum(planned_bytes(plan.transfers, self.width, self.wire_dtype.itemsize).values())

    def student_pass(
        self,
        plan: BatchPlan,
        targets: Targets,
        *,
        train: bool,
        chunks: Sequence[torch.nn.Module] | None = None,
        on_output: OnOutput = no_output_loss,
    ) -> dict[int, torch.Tensor]:
        """The student's forward, and with `train` the backward of Eq. 6 into its gradients. No LM head is called.

        Returns:
            This rank's {student layer: sums of `ALIGNMENT_FIELDS`}; `reduce` makes a report of them.
        """
        aligner = Aligner(
            self.pairs,
            targets,
            plan.student.tokens,
            self.student.grid,
            scale=LossScale(self.config.coefficient, len(self.pairs), plan.num_tokens),
            how=self.config.normalize,
            device=self.platform.device,
        )
        taps = attach_taps(self.student, aligner.teacher_layer, self.config.final_state, aligner.on_state)
        blocks = token_blocks(plan.samples, plan.student.arrangement, self.student.grid.coords.dp)
        try:
            run_schedule(
                self.student, self.platform, blocks, forward_only=not train, chunks=chunks, on_output=on_output
            )
        finally:
            for tap in taps:
                tap.remove()
        return aligner.sums()

    def reduce(self, sums: dict[int, torch.Tensor]) -> AlignmentReport:
        """Add the ranks' sums and average. Collective: one all-reduce of a few numbers a layer."""
        zero = torch.zeros(len(ALIGNMENT_FIELDS), dtype=torch.float64)
        table = torch.stack([sums.get(pair.student_layer, zero) for pair in self.pairs])
        dist.all_reduce(table)
        rows = table[:, ALIGNMENT_FIELDS.index("rows")]
        means = dict(zip(ALIGNMENT_FIELDS, (table / rows.unsqueeze(1)).T.tolist(), strict=True))
        return AlignmentReport(
            loss=self.config.coefficient * sum(means["loss"]) / len(self.pairs),
            student_layers=[pair.student_layer for pair in self.pairs],
            teacher_layers=[pair.teacher_layer for pair in self.pairs],
            layer_loss=means["loss"],
            mse=means["mse"],
            cosine=means["cosine"],
            norm_ratio=means["norm_ratio"],
        )
