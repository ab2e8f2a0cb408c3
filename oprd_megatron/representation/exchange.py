"""Executing a routing plan: teacher states are selected where they arise, sent once, and land where the student's taps look.

    delivery = Delivery(route, ...)           both ends allocate what the plan says, and nothing else, ever
    delivery.put(layer, mb, hidden)           called by the teacher's taps: supervised rows only, selected before any cast
    delivery.post()                           all sends and receives, between the two schedules, never inside them
    delivery.wait()                           until they are done; what was sent is freed
    delivery.rows(mb, layer)                  student rank: one target row for each supervised row of this rank
    delivery.release(mb, layer)               after the backward that used them
    delivery.close()                          frees what nobody released

Taps write straight into the buffer that is sent, or, where source and destination are the same rank, into the target itself;
what is received is received into its place in the target. So a rank never holds a state twice, and the plan's `held_bytes` is
what is allocated.

Legend: N supervised rows of a micro-batch on this rank; n of them in a transfer; L layers of a transfer; C columns of the wire.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from oprd_megatron.parallel.activity import here
from oprd_megatron.representation.placement import TokenPlacement
from oprd_megatron.representation.route import Route, Transfer
from oprd_megatron.representation.wire import Wire

Project = Callable[[int, torch.Tensor], torch.Tensor]
"""(teacher layer, states [n, D_T]) -> [n, r]."""


class Delivery:
    """The teacher states of one chunk of a batch on this rank, from the teacher's taps to the student's loss.

    Args:
        route: the plan.
        teacher_tokens: where the supervised tokens lie on the teacher's grid.
        rank: this rank.
        wire: format of the states.
        device: where they are kept and what they travel between.
        pinned: in pinned host memory (`device` is the CPU of a machine with a GPU).
        project: the bridge on the teacher's side; None keeps states as they are.

    Attributes:
        sent_bytes: what `post` sent.
        rounding: [sum of the relative errors that a lossy wire made, number of states]; zeros for another wire.
    """

    def __init__(
        self,
        route: Route,
        teacher_tokens: TokenPlacement,
        rank: int,
        wire: Wire,
        device: torch.device,
        *,
        pinned: bool = False,
        project: Project | None = None,
    ) -> None:
        self.wire, self.project, self.sent_bytes = wire, project, 0
        self.rounding = np.zeros(2)
        transfers = route.transfers(rank)
        self._sends = [t for t in transfers if t.source == rank != t.destination]
        self._receives = [t for t in transfers if t.destination == rank != t.source]
        self._layers: dict[int, tuple[int, ...]] = {}
        self._left: dict[tuple[int, int], set[int]] = {}
        sizes: dict[tuple[int, int], int] = defaultdict(int)
        for transfer in transfers:
            if transfer.destination == rank:
                self._layers[transfer.teacher_stage] = transfer.teacher_layers
                sizes[transfer.student_micro_batch, transfer.teacher_stage] += len(transfer.tokens)
        self._stage_of = {layer: stage for stage, layers in self._layers.items() for layer in layers}

        def empty(rows: int, layers: int) -> torch.Tensor:
            return torch.empty(rows, layers, wire.columns, dtype=wire.dtype, device=device, pin_memory=pinned)

        self._targets = {key: empty(rows, len(self._layers[key[1]])) for key, rows in sizes.items()}
        for key in self._targets:
            self._left[key] = set(self._layers[key[1]])
        self._outgoing = [empty(len(t.tokens), len(t.teacher_layers)) for t in self._sends]
        self._wanted: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        outgoing = iter(self._outgoing)
        for transfer in transfers:
            if transfer.source == rank:
                block = self._slice(transfer) if transfer.destination == rank else next(outgoing)
                rows = torch.from_numpy(teacher_tokens.local_row[transfer.tokens])
                for index, layer in enumerate(transfer.teacher_layers):
                    self._wanted[transfer.teacher_micro_batch, layer].append((rows, block[:, index]))
        self._works: list[dist.Work] = []

    def _slice(self, transfer: Transfer) -> torch.Tensor:
        """The transfer's place among this rank's targets: [n, L, C], contiguous."""
        rows = slice(transfer.first_row, transfer.first_row + len(transfer.tokens))
        return self._targets[transfer.student_micro_batch, transfer.teacher_stage][rows]

    def put(self, layer: int, micro_batch: int, hidden: torch.Tensor) -> None:
        """Keep the rows that the plan wants of hidden [P_local, 1, D]; a tap's `on_state`."""
        for rows, place in self._wanted.pop((micro_batch, layer), ()):
            selected = hidden.detach().flatten(0, 1).index_select(0, rows.to(hidden.device))
            if self.project is not None:
                selected = self.project(layer, selected)
            place.copy_(self.wire.encode(selected))
            if self.wire.is_lossy:
                self.rounding += [float(self.wire.relative_error(selected).sum()), len(selected)]

    def post(self) -> None:
        """Start all sends and receives; in the order of the plan, so that messages between two ranks match."""
        self._wanted.clear()
        operations = [
            *(dist.P2POp(dist.isend, b, t.destination) for t, b in zip(self._sends, self._outgoing, strict=True)),
            *(dist.P2POp(dist.irecv, self._slice(transfer), transfer.source) for transfer in self._receives),
        ]
        self.sent_bytes = sum(block.nbytes for block in self._outgoing)
        self._works = list(dist.batch_isend_irecv(operations)) if operations else []

    def wait(self) -> None:
        """Wait until what was posted is done; what was sent is freed."""
        with here.waiting():
            for work in self._works:
                work.wait()
        self._works = []
        self._outgoing.clear()

    def close(self) -> None:
        """Wait, and free what is left, whoever still has this delivery at hand."""
        self.wait()
        self._wanted.clear()
        self._left.clear()
        self._targets.clear()

    def rows(self, micro_batch: int, teacher_layer: int) -> torch.Tensor | None:
        """The targets [N, C], in the order of `block_rows`; None where this rank supervises no token of the micro-batch."""
        stage = self._stage_of.get(teacher_layer)
        if stage is None or (micro_batch, stage) not in self._targets:
            return None
        return self._targets[micro_batch, stage][:, self._layers[stage].index(teacher_layer)]

    def release(self, micro_batch: int, teacher_layer: int) -> None:
        """Say that a layer's targets of a micro-batch are not needed again; memory is freed with the last of a stage."""
        key = micro_batch, self._stage_of.get(teacher_layer, -1)
        if key in self._left:
            self._left[key].discard(teacher_layer)
            if not self._left[key]:
                del self._left[key], self._targets[key]

    @property
    def held_bytes(self) -> int:
        """Bytes of states that this rank holds now."""
        return sum(block.nbytes for block in (*self._targets.values(), *self._outgoing))
