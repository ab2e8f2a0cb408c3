"""Bounded memory for teacher states: which chunks' states a rank holds at a time.

A chunk is opened when there is room for all that the plan says this rank will hold of it, and closed when its states were sent
and used. A rank that has both models has one chunk open. A rank of the teacher alone sends and goes on, and waits for its
oldest sends when the next chunk would not fit. A rank of the student alone opens following chunks while they fit, so that
their states arrive during its own work. The budget is `distill.spool_bytes`; the planner makes every chunk fit into it.

The teacher's outputs, where some are looked at, travel with the states of their chunk: in a delivery of their own, posted right
after it on both ends.
"""

from __future__ import annotations

import numpy as np
import torch

from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.platform import Platform
from oprd_megatron.representation.batch import BatchPlan
from oprd_megatron.representation.exchange import Delivery, Project
from oprd_megatron.representation.wire import Wire


class Spool:
    """The deliveries of one batch on this rank.

    Args:
        plan: the batch.
        rank: this rank.
        wire: format of the states.
        config: budget and place.
        platform: of this run.
        teaches, learns: whether this rank holds a part of the teacher, of the student.
        project: the bridge on the teacher's side, (layer, [n, D_T]) -> [n, r].
        output_wire: format of the teacher's outputs; None if none travel.
    """

    def __init__(
        self,
        plan: BatchPlan,
        rank: int,
        wire: Wire,
        config: DistillConfig,
        platform: Platform,
        *,
        teaches: bool,
        learns: bool,
        project: Project | None = None,
        output_wire: Wire | None = None,
    ) -> None:
        self.plan, self.rank, self.wire, self.project, self.output_wire = plan, rank, wire, project, output_wire
        self.teaches, self.learns = teaches, learns
        self.budget = config.spool_bytes
        self.device = torch.device("cpu") if config.spool == "host" else platform.device
        self.pinned = config.spool == "host" and platform.is_cuda
        output_bytes = output_wire.state_bytes if output_wire else 0
        self.sizes = [chunk.held_bytes(wire.state_bytes, output_bytes).get(rank, 0) for chunk in plan.chunks]
        self.sent_bytes = self.peak_bytes = 0
        self.rounding = np.zeros(2)
        self._open: dict[int, list[Delivery]] = {}
        self._posted: set[int] = set()

    def open(self, number: int) -> Delivery:
        """The delivery of a chunk, to be filled; waits for older sends if there is no room."""
        if number not in self._open:
            while self._open and not self._fits(number):
                self.close(min(self._open))
            self._allocate(number)
        return self._open[number][0]

    def outputs(self, number: int) -> Delivery | None:
        """The delivery of an open chunk's outputs, if there are any."""
        return self._open[number][1] if len(self._open[number]) > 1 else None

    def exchange(self, number: int) -> None:
        """Send what this rank's teacher computed of a chunk; return once what its student needs is there. A rank of the
        student alone also gets ready for the following chunks, as far as they fit."""
        self._post(number)
        if self.learns and not self.teaches:
            following = number + 1
            while following < len(self.sizes) and (following in self._open or self._fits(following)):
                if following not in self._open:
                    self._allocate(following)
                    self._post(following)
                following += 1
        if self.learns:
            for delivery in self._open[number]:
                delivery.wait()

    def close(self, number: int) -> None:
        """Wait for a chunk's sends and free what is left of it."""
        deliveries = self._open.pop(number)
        for delivery in deliveries:
            delivery.close()
            self.sent_bytes += delivery.sent_bytes
        self.rounding += deliveries[0].rounding

    def finish(self) -> None:
        """Close what is open."""
        for number in sorted(self._open):
            self.close(number)

    def _post(self, number: int) -> None:
        if number not in self._posted:
            self._posted.add(number)
            for delivery in self._open[number]:
                delivery.post()

    @property
    def held_bytes(self) -> int:
        """Bytes of states that this rank holds now."""
        return sum(delivery.held_bytes for deliveries in self._open.values() for delivery in deliveries)

    def _fits(self, number: int) -> bool:
        return self.budget is None or self.held_bytes + self.sizes[number] <= self.budget

    def _allocate(self, number: int) -> None:
        chunk = self.plan.chunks[number]
        states = Delivery(
            chunk.route, chunk.teacher.tokens, self.rank, self.wire, self.device,
            pinned=self.pinned, project=self.project,
        )  # fmt: skip
        self._open[number] = [states]
        outputs = chunk.outputs
        if self.output_wire and outputs and outputs.route and outputs.teacher:
            self._open[number].append(
                Delivery(outputs.route, outputs.teacher, self.rank, self.output_wire, self.device, pinned=self.pinned)
            )
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
