"""Executing a routing plan: teacher states are selected where they arise, sent once, and laid out for the student's taps.

    outbox  = Outbox(...)              teacher rank: what the plan wants of each micro-batch and layer
    outbox.put(layer, mb, hidden)      called by the teacher's taps; keeps only the supervised rows, before any cast
    targets = exchange(outbox, ...)    between the two schedules, never inside them
    targets.rows(mb, layer)            student rank: one target row per supervised row of this rank

Every pair of ranks exchanges one message. Nothing is sent for blocks whose source and destination are the same rank.

Legend: N supervised rows of a micro-batch on this rank; D teacher width; dtype is the wire dtype.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from oprd_megatron.representation.placement import TokenPlacement
from oprd_megatron.representation.route import Transfer


class Outbox:
    """The teacher's selected states on this rank, by transfer.

    Args:
        transfers: the whole plan.
        tokens: where the supervised tokens lie on the teacher's grid.
        rank: this rank.
        width: D.
        dtype: wire dtype.
        device: of the states.
    """

    def __init__(
        self,
        transfers: Sequence[Transfer],
        tokens: TokenPlacement,
        rank: int,
        *,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.transfers, self.rank = transfers, rank
        self.width, self.dtype, self.device = width, dtype, device
        self._states: dict[tuple[int, int], torch.Tensor] = {}
        self._rows: dict[int, torch.Tensor] = {}
        self._wanted: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, transfer in enumerate(transfers):
            if transfer.source == rank:
                self._rows[number] = torch.from_numpy(tokens.local_row[transfer.tokens]).to(device)
                for layer in transfer.teacher_layers:
                    self._wanted[transfer.teacher_micro_batch, layer].append(number)

    def put(self, layer: int, micro_batch: int, hidden: torch.Tensor) -> None:
        """Keep the rows that the plan wants of hidden [S_local, B, D]; a tap's `on_state`."""
        for number in self._wanted[micro_batch, layer]:
            rows = hidden.detach().flatten(0, 1).index_select(0, self._rows[number])
            self._states[number, layer] = rows.to(self.dtype)

    def take(self, number: int) -> torch.Tensor:
        """Remove and return transfer `number`'s block [layers * n, D]."""
        return torch.cat([self._states.pop((number, layer)) for layer in self.transfers[number].teacher_layers])


@dataclass(frozen=True)
class Targets:
    """Teacher states for this rank's student taps.

    Attributes:
        states: {(student micro-batch, teacher layer): [N, D]}, rows ascending by the student's row.
    """

    states: dict[tuple[int, int], torch.Tensor]

    def rows(self, micro_batch: int, teacher_layer: int) -> torch.Tensor | None:
        """The targets [N, D], or None where this rank supervises no token of the micro-batch."""
        return self.states.get((micro_batch, teacher_layer))


def exchange(outbox: Outbox, student_tokens: TokenPlacement) -> tuple[Targets, int]:
    """Run the plan. Collective over the world: every rank calls it.

    Args:
        outbox: filled by the teacher's taps (empty on ranks that send nothing).
        student_tokens: where the supervised tokens lie on the student's grid.

    Returns:
        This rank's targets, and the bytes that it sent.
    """
    transfers, rank = outbox.transfers, outbox.rank
    sends: dict[int, list[int]] = defaultdict(list)
    receives: dict[int, list[int]] = defaultdict(list)
    blocks: dict[int, torch.Tensor] = {}
    for number, transfer in enumerate(transfers):
        if transfer.source == rank == transfer.destination:
            blocks[number] = outbox.take(number)
        elif transfer.source == rank:
            sends[transfer.destination].append(number)
        elif transfer.destination == rank:
            receives[transfer.source].append(number)
    outgoing = {peer: torch.cat([outbox.take(number) for number in numbers]) for peer, numbers in sends.items()}
    incoming = {
        peer: torch.empty(
            sum(transfers[number].num_rows for number in numbers),
            outbox.width,
            dtype=outbox.dtype,
            device=outbox.device,
        )
        for peer, numbers in receives.items()
    }
    _communicate(outgoing, incoming)
    for peer, numbers in receives.items():
        sizes = [transfers[number].num_rows for number in numbers]
        blocks.update(zip(numbers, incoming[peer].split(sizes), strict=True))
    return _lay_out(transfers, blocks, student_tokens), sum(buffer.nbytes for buffer in outgoing.values())


def _communicate(outgoing: dict[int, torch.Tensor], incoming: dict[int, torch.Tensor]) -> None:
    """All sends and receives at once; posted in the order of the peers, so that no cycle of waits can form."""
    operations = [
        *(dist.P2POp(dist.isend, buffer, peer) for peer, buffer in sorted(outgoing.items())),
        *(dist.P2POp(dist.irecv, buffer, peer) for peer, buffer in sorted(incoming.items())),
    ]
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()


def _lay_out(transfers: Sequence[Transfer], blocks: dict[int, torch.Tensor], tokens: TokenPlacement) -> Targets:
    """Put the blocks' rows in the order of the student's rows; a block that is a whole target is not copied."""
    pieces: dict[tuple[int, int], list[tuple[np.ndarray, torch.Tensor]]] = defaultdict(list)
    for number in sorted(blocks):
        transfer = transfers[number]
        for layer, rows in zip(transfer.teacher_layers, blocks[number].split(len(transfer.tokens)), strict=True):
            pieces[transfer.student_micro_batch, layer].append((tokens.row[transfer.tokens], rows))
    states = {}
    for key, parts in pieces.items():
        order = np.argsort(np.concatenate([rows for rows, _ in parts]), kind="stable")
        whole = parts[0][1] if len(parts) == 1 else torch.cat([states for _, states in parts])
        states[key] = whole if len(parts) == 1 else whole[torch.from_numpy(order).to(whole.device)]
    return Targets(states)
