"""Teacher states to the student's ranks, batch by batch: what training, evaluation, bridge fitting and the measured layer map
have in common. Who listens on the student's side decides what becomes of them.

A batch goes through in chunks (`batch.py`). Where both models share the ranks, each chunk is forwarded by the teacher,
exchanged and taken up by the student in turn. On ranks of its own the teacher goes on to the next chunks as soon as its states
are on their way, and the student has room for the states of the next chunk ready while it works on this one: each side holds
at most the spool's budget, and waits when that is full.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.models import Model, no_output_loss, run_schedule
from oprd_megatron.models.schedule import OnOutput
from oprd_megatron.platform import Platform
from oprd_megatron.representation.batch import BatchPlan, Chunk, Planner, Sample
from oprd_megatron.representation.exchange import Delivery, Project
from oprd_megatron.representation.feed import micro_batches
from oprd_megatron.representation.layer_map import LayerPair
from oprd_megatron.representation.rows import block_rows
from oprd_megatron.representation.spool import Spool
from oprd_megatron.representation.taps import OnState, Tapped, attached_taps
from oprd_megatron.representation.wire import Wire

Phase = Callable[[str], contextlib.AbstractContextManager[None]]
"""Times a phase: teacher, exchange or student."""


class Forward(Protocol):
    """Runs the student over a chunk with taps on some layers."""

    def __call__(self, layers: Collection[int], on_state: OnState) -> None: ...


Learn = Callable[[Chunk, Delivery, Forward], None]
"""The student's side of a chunk, on its ranks: takes the delivered states and runs the student once."""

OnOutputs = Callable[[int, Chunk, Delivery | None], OnOutput]
"""(chunk's number, chunk, the teacher's outputs that were delivered) -> what is called with the student's final states, on its
last stage."""

OnRows = Callable[[int, torch.Tensor, np.ndarray], None]
"""(teacher layer, states [N, D_T], their token numbers [N])."""


class OutputSignal(Protocol):
    """What is looked at of the models' outputs besides their states.

    Attributes:
        wire: format of what travels of the teacher's; None if nothing does.
    """

    wire: Wire | None

    def predicted(self, sample: Sample) -> Sequence[int]:
        """Response tokens (0-based) of a sample whose predictions are looked at."""
        ...

    def of_teacher(self, chunk: Chunk) -> Callable[[int, torch.Tensor], torch.Tensor]:
        """(micro-batch, final states [P_local, 1, D_T]) -> what travels [P_local, 1, C], right at least in the rows that
        this rank sends. Called on the teacher's last stage, on all of its tensor-parallel ranks alike."""
        ...


@dataclass(frozen=True)
class Passes:
    """How a batch is run.

    Attributes:
        train: with backward, into the student's gradients.
        finalize: with the last chunk gradients are reduced over ranks; False when another batch of the same step follows.
        chunks: the student as wrapped for training (mcore's DDP); the bare one if left out.
        on_outputs: makes, for each chunk, what is called with the student's final states; left out, there is no output loss.
        phase: times teacher, exchange and student.
    """

    train: bool = False
    finalize: bool = True
    chunks: Sequence[torch.nn.Module] | None = None
    on_outputs: OnOutputs | None = None
    phase: Phase = lambda name: contextlib.nullcontext()


class StateFlow:
    """The way from the teacher's layers to the student's ranks.

    Args:
        teacher, student: the models.
        pairs: which teacher layer's states go to the ranks of which student layer.
        config: positions, spool, final state.
        platform: of this run.
        wire: format of what travels.
        project: what the teacher's ranks make of a state first; None sends it as it is.
        micro_batch_size, micro_batch_tokens: as in `run`.
        tapped: states, or updates, of both models.
        signal: what is looked at of the outputs; None if nothing is.

    Attributes:
        sent_bytes, peak_bytes, rounding: of the last `run` on this rank: bytes of states sent, most bytes held at a time, and
            what the wire lost (`Delivery`).
    """

    def __init__(
        self,
        teacher: Model,
        student: Model,
        pairs: Sequence[LayerPair],
        config: DistillConfig,
        platform: Platform,
        wire: Wire,
        project: Project | None,
        micro_batch_size: int,
        micro_batch_tokens: int | None = None,
        tapped: Tapped = "state",
        signal: OutputSignal | None = None,
    ) -> None:
        self.signal = signal
        self.teacher, self.student, self.config, self.platform = teacher, student, config, platform
        self.pairs, self.wire, self.project, self.tapped = pairs, wire, project, tapped
        layouts = teacher.grid.layout, student.grid.layout
        self.output_wire = signal.wire if signal else None
        self.planner = Planner(
            pairs, *layouts, config, wire.state_bytes, micro_batch_size, micro_batch_tokens,
            predicted=signal.predicted if signal else None, output_bytes=self._output_bytes,
        )  # fmt: skip
        self.sent_bytes = self.peak_bytes = 0
        self.rounding = np.zeros(2)

    @property
    def _output_bytes(self) -> int:
        return self.output_wire.state_bytes if self.output_wire else 0

    def plan(self, samples: Sequence[Sample]) -> BatchPlan:
        """Chunks of a global batch, arranged and routed."""
        return self.planner.plan(samples)

    def planned_bytes(self, plan: BatchPlan) -> int:
        """Bytes that the exchange moves between ranks, over the whole world."""
        return sum(chunk.total_bytes(self.wire.state_bytes, self._output_bytes) for chunk in plan.chunks)

    def run(self, plan: BatchPlan, learn: Learn, passes: Passes) -> None:
        """Take a batch through teacher, exchange and student. No LM head is called on either model. Collective."""
        teaches, learns, phase = self.teacher.grid.is_member, self.student.grid.is_member, passes.phase
        spool = Spool(
            plan, dist.get_rank(), self.wire, self.config, self.platform,
            teaches=teaches, learns=learns, project=self.project, output_wire=self.output_wire,
        )  # fmt: skip
        for number, chunk in enumerate(plan.chunks):
            with phase("exchange"):
                delivery = spool.open(number)
            if teaches:
                with phase("teacher"):
                    self._teach(chunk, delivery.put, self._send_outputs(chunk, spool.outputs(number)))
            with phase("exchange"):
                spool.exchange(number)
            if learns:
                with phase("student"):
                    on_output: OnOutput = no_output_loss
                    if passes.on_outputs:
                        on_output = passes.on_outputs(number, chunk, spool.outputs(number))
                    learn(chunk, delivery, self._forward(plan, number, passes, on_output))
                spool.close(number)
        with phase("exchange"):
            spool.finish()
        self.sent_bytes, self.peak_bytes, self.rounding = spool.sent_bytes, spool.peak_bytes, spool.rounding

    def teach(self, plan: BatchPlan, on_rows: OnRows) -> None:
        """Run the teacher alone over a batch; on each of its ranks `on_rows` gets that rank's share of the supervised states,
        so that every (token, layer) is seen exactly once in the world. Collective over the teacher's grid."""
        if not self.teacher.grid.is_member:
            return
        for chunk in plan.chunks:
            tokens = chunk.teacher.tokens
            rows = block_rows(tokens, np.arange(len(tokens.row)), self.teacher.grid, self.platform.device)

            def on_state(layer: int, micro_batch: int, hidden: torch.Tensor, rows=rows) -> None:  # type: ignore[no-untyped-def]
                if micro_batch in rows:
                    own = rows[micro_batch]
                    on_rows(layer, hidden.detach().flatten(0, 1).index_select(0, own.mine), own.own_tokens)

            self._teach(chunk, on_state, no_output_loss)

    def _teach(self, chunk: Chunk, on_state: OnState, on_output: OnOutput) -> None:
        layers = {pair.teacher_layer for pair in self.pairs}
        read = [sample.teacher_ids for sample in chunk.samples]
        fed = micro_batches(read, chunk.teacher.arrangement, self.teacher.grid)
        with attached_taps(self.teacher, layers, self.config.final_state, on_state, self.tapped):
            run_schedule(self.teacher, self.platform, fed, forward_only=True, on_output=on_output)

    def _send_outputs(self, chunk: Chunk, delivery: Delivery | None) -> OnOutput:
        if delivery is None or self.signal is None:
            return no_output_loss
        last, of_teacher = self.teacher.grid.layout.num_layers, self.signal.of_teacher(chunk)

        def on_output(micro_batch: int, hidden: torch.Tensor) -> torch.Tensor:
            delivery.put(last, micro_batch, of_teacher(micro_batch, hidden))
            return no_output_loss(micro_batch, hidden)

        return on_output

    def _forward(self, plan: BatchPlan, number: int, passes: Passes, on_output: OnOutput) -> Forward:
        chunk = plan.chunks[number]

        def forward(layers: Collection[int], on_state: OnState) -> None:
            fed = micro_batches([sample.ids for sample in chunk.samples], chunk.student.arrangement, self.student.grid)
            with attached_taps(self.student, layers, self.config.final_state, on_state, self.tapped):
                run_schedule(
                    self.student,
                    self.platform,
                    fed,
                    forward_only=not passes.train,
                    chunks=passes.chunks,
                    on_output=on_output,
                    finalize=passes.finalize and number + 1 == len(plan.chunks),
                )

        return forward
