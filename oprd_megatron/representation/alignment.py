"""One batch through the method: teacher states, exchange, the student's loss. The trainer and the evaluation both use it.

    plan   = alignment.plan(samples)
    report = alignment.reduce(alignment.run(plan, train=True))

A batch goes through in chunks (`batch.py`). Where both models share the ranks, each chunk is forwarded by the teacher,
exchanged and trained on in turn. On ranks of its own the teacher goes on to the next chunks as soon as its states are on
their way, and the student has room for the states of the next chunk ready while it works on this one: each side holds
at most the spool's budget, and waits when that is full.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.models import Model, no_output_loss, run_schedule
from oprd_megatron.models.schedule import OnOutput
from oprd_megatron.platform import Platform
from oprd_megatron.representation.batch import BatchPlan, Chunk, Planner, Sample
from oprd_megatron.representation.bridge import Bridge, load_bridge
from oprd_megatron.representation.exchange import Delivery
from oprd_megatron.representation.feed import micro_batches
from oprd_megatron.representation.injection import Aligner
from oprd_megatron.representation.layer_map import resolve_layer_pairs
from oprd_megatron.representation.loss import ALIGNMENT_FIELDS, LossScale
from oprd_megatron.representation.spool import Spool
from oprd_megatron.representation.taps import attached_taps
from oprd_megatron.representation.wire import Wire, wire_name

Phase = Callable[[str], contextlib.AbstractContextManager[None]]
"""Times a phase: teacher, exchange or student."""


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
        wire_error: mean relative rounding error of the teacher's states on an fp8 wire, None on others.
    """

    loss: float
    student_layers: list[int]
    teacher_layers: list[int]
    layer_loss: list[float]
    mse: list[float]
    cosine: list[float]
    norm_ratio: list[float]
    wire_error: float | None

    @property
    def mean_cosine(self) -> float:
        return sum(self.cosine) / len(self.cosine)


class Alignment:
    """The representation loss between a frozen teacher and a student, whatever their layouts.

    Args:
        teacher, student: the models; without a bridge their widths must be equal.
        config: what is aligned.
        platform: of this run.
        micro_batch_size: rollouts in one forward pass.
        micro_batch_tokens: dynamic batching instead.

    Attributes:
        sent_bytes, peak_bytes, rounding: of the last `run` on this rank: bytes of states sent, most bytes held at a time, and
            what the wire lost (`Delivery`).
    """

    def __init__(
        self,
        teacher: Model,
        student: Model,
        config: DistillConfig,
        platform: Platform,
        micro_batch_size: int,
        micro_batch_tokens: int | None = None,
    ) -> None:
        self.teacher, self.student, self.config, self.platform = teacher, student, config, platform
        self.pairs = resolve_layer_pairs(config, student.architecture.num_layers, teacher.architecture.num_layers)
        self.bridge: Bridge | None = None
        widths = teacher.architecture.hidden_size, student.architecture.hidden_size
        if config.bridge is not None:
            self.bridge = load_bridge(config.bridge, self.pairs, *widths, platform.device)
        dtype: Literal["fp32", "bf16"] = "bf16" if teacher.config.bf16 else "fp32"
        self.wire = Wire(wire_name(config, dtype), self.bridge.rank if self.bridge else widths[0])
        self.planner = Planner(
            self.pairs,
            teacher.grid.layout,
            student.grid.layout,
            config,
            self.wire.state_bytes,
            micro_batch_size,
            micro_batch_tokens,
        )
        self.sent_bytes = self.peak_bytes = 0
        self.rounding = np.zeros(2)

    def plan(self, samples: Sequence[Sample]) -> BatchPlan:
        """Chunks of a global batch, arranged and routed."""
        return self.planner.plan(samples)

    def planned_bytes(self, plan: BatchPlan) -> int:
        """Bytes that the exchange moves between ranks, over the whole world."""
        return sum(chunk.route.total_bytes(self.wire.state_bytes) for chunk in plan.chunks)

    def run(
        self,
        plan: BatchPlan,
        *,
        train: bool,
        chunks: Sequence[torch.nn.Module] | None = None,
        on_teacher_output: Sequence[OnOutput] | None = None,
        on_student_output: Sequence[OnOutput] | None = None,
        phase: Phase = lambda name: contextlib.nullcontext(),
    ) -> dict[int, torch.Tensor]:
        """Take a batch through teacher, exchange and student. No LM head is called on either model. Collective.

        Args:
            plan: from `plan`.
            train: run the backward of Eq. 6 into the student's gradients, which are finalised with the last chunk.
            chunks: the student as wrapped for training (mcore's DDP); the bare one if left out.
            on_teacher_output, on_student_output: for each chunk of the plan, called with the last stage's final states.
            phase: times teacher, exchange and student.

        Returns:
            This rank's {student layer: sums of `ALIGNMENT_FIELDS`}; `reduce` makes a report of them.
        """
        project = self.bridge.project_teacher if self.bridge else None
        teaches, learns = self.teacher.grid.is_member, self.student.grid.is_member
        spool = Spool(
            plan,
            dist.get_rank(),
            self.wire,
            self.config,
            self.platform,
            teaches=teaches,
            learns=learns,
            project=project,
        )
        totals: dict[int, torch.Tensor] = {}
        for number, chunk in enumerate(plan.chunks):
            with phase("exchange"):
                delivery = spool.open(number)
            if teaches:
                with phase("teacher"):
                    self._teacher_forward(chunk, delivery, _at(on_teacher_output, number))
            with phase("exchange"):
                spool.exchange(number)
            if learns:
                scale = LossScale(self.config.coefficient, len(self.pairs), plan.num_tokens)
                with phase("student"):
                    sums = self._student_pass(
                        chunk,
                        delivery,
                        scale,
                        train,
                        chunks,
                        _at(on_student_output, number),
                        number + 1 == len(plan.chunks),
                    )
                spool.close(number)
                for layer, value in sums.items():
                    totals[layer] = totals.get(layer, torch.zeros_like(value)) + value
        with phase("exchange"):
            spool.finish()
        self.sent_bytes, self.peak_bytes, self.rounding = spool.sent_bytes, spool.peak_bytes, spool.rounding
        return totals

    def _teacher_forward(self, chunk: Chunk, delivery: Delivery, on_output: OnOutput) -> None:
        layers = {pair.teacher_layer for pair in self.pairs}
        fed = micro_batches(chunk.samples, chunk.teacher.arrangement, self.teacher.grid)
        with attached_taps(self.teacher, layers, self.config.final_state, delivery.put):
            run_schedule(self.teacher, self.platform, fed, forward_only=True, on_output=on_output)

    def _student_pass(
        self,
        chunk: Chunk,
        delivery: Delivery,
        scale: LossScale,
        train: bool,
        chunks: Sequence[torch.nn.Module] | None,
        on_output: OnOutput,
        finalize: bool,
    ) -> dict[int, torch.Tensor]:
        aligner = Aligner(
            self.pairs,
            delivery,
            chunk.student.tokens,
            chunk.route.order,
            self.student.grid,
            scale=scale,
            how=self.config.normalize,
            device=self.platform.device,
            bridge=self.bridge,
        )
        fed = micro_batches(chunk.samples, chunk.student.arrangement, self.student.grid)
        with attached_taps(self.student, aligner.teacher_layer, self.config.final_state, aligner.on_state):
            run_schedule(
                self.student,
                self.platform,
                fed,
                forward_only=not train,
                chunks=chunks,
                on_output=on_output,
                finalize=finalize,
            )
        return aligner.sums()

    def reduce(self, sums: dict[int, torch.Tensor]) -> AlignmentReport:
        """Add the ranks' sums and average. Collective: all-reduces of a few numbers a layer."""
        zero = torch.zeros(len(ALIGNMENT_FIELDS), dtype=torch.float64)
        table = torch.stack([sums.get(pair.student_layer, zero) for pair in self.pairs])
        dist.all_reduce(table)
        rounding = torch.from_numpy(self.rounding)
        dist.all_reduce(rounding)
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
            wire_error=float(rounding[0] / rounding[1]) if self.wire.is_lossy else None,
        )


def _at(callbacks: Sequence[OnOutput] | None, number: int) -> OnOutput:
    return no_output_loss if callbacks is None else callbacks[number]
