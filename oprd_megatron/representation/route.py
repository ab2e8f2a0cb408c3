"""The routing plan: which teacher rank sends which tokens of which layers to which student rank.

The plan is data. It is a pure function of both grids, both arrangements, the layer pairs and the supervised positions;
it can be printed and tested without a process group, and every rank computes the same one, so that nobody has to
negotiate. `exchange.py` executes it.

A student rank needs, for each supervised layer on its stage, the teacher's states at the tokens that it supervises
(`TokenPlacement.shard`). Each (token, layer) travels at most once to the one rank that needs it. Where the teacher's
state is replicated over its tensor-parallel ranks the student rank itself is chosen as the source if it is one of
them: what is already there does not travel.

Teacher layers that go from one teacher stage to one student stage share the same tokens, so they travel together as one
`Transfer`; a teacher layer that supervises two student layers of one stage travels once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from oprd_megatron.parallel.layout import Coords, GridLayout
from oprd_megatron.representation.layer_map import LayerPair
from oprd_megatron.representation.placement import TokenPlacement


@dataclass(frozen=True)
class Transfer:
    """One block of states from one rank to another (or to itself, which moves no bytes).

    Attributes:
        source, destination: global ranks.
        teacher_layers: the layers; the block holds them in this order.
        teacher_micro_batch, student_micro_batch: where the tokens are on either side.
        tokens: supervised token numbers, ascending by the student's row; shape [n].
    """

    source: int
    destination: int
    teacher_layers: tuple[int, ...]
    teacher_micro_batch: int
    student_micro_batch: int
    tokens: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.teacher_layers) * len(self.tokens)


def plan_route(
    pairs: Sequence[LayerPair],
    teacher: GridLayout,
    teacher_tokens: TokenPlacement,
    student: GridLayout,
    student_tokens: TokenPlacement,
) -> list[Transfer]:
    """Plan the exchange of one global batch; the list's order is the same on every rank.

    Args:
        pairs: supervised layers.
        teacher, student: the grids.
        teacher_tokens, student_tokens: where the same M tokens lie on either grid.
    """
    together: dict[tuple[int, int], set[int]] = defaultdict(set)
    for pair in pairs:
        stages = teacher.stage_of(pair.teacher_layer), student.stage_of(pair.student_layer)
        together[stages].add(pair.teacher_layer)
    transfers = []
    for (teacher_stage, student_stage), layers in sorted(together.items()):
        destination = _ranks(student, student_stage, student_tokens.shard, student_tokens.dp)
        source = _sources(teacher, teacher_stage, teacher_tokens, destination)
        keys = np.stack([source, destination, teacher_tokens.micro_batch, student_tokens.micro_batch], axis=1)
        order = np.lexsort((student_tokens.row, *keys.T[::-1]))
        boundaries = np.flatnonzero(np.any(np.diff(keys[order], axis=0), axis=1)) + 1
        for tokens in np.split(order, boundaries):
            if len(tokens):
                from_rank, to_rank, teacher_mb, student_mb = (int(value) for value in keys[tokens[0]])
                transfers.append(Transfer(from_rank, to_rank, tuple(sorted(layers)), teacher_mb, student_mb, tokens))
    return transfers


def planned_bytes(transfers: Sequence[Transfer], width: int, itemsize: int) -> dict[tuple[int, int], int]:
    """Bytes by (source, destination) for states of `width` numbers of `itemsize` bytes; local blocks move none."""
    moved: dict[tuple[int, int], int] = defaultdict(int)
    for transfer in transfers:
        if transfer.source != transfer.destination:
            moved[transfer.source, transfer.destination] += transfer.num_rows * width * itemsize
    return dict(moved)


def _ranks(layout: GridLayout, stage: int, tp: np.ndarray, dp: np.ndarray) -> np.ndarray:
    """Global ranks at coordinates (tp[i], stage, dp[i])."""
    table = np.array([[layout.rank(Coords(tp=t, pp=stage, dp=d)) for d in range(layout.dp)] for t in range(layout.tp)])
    return table[tp, dp]


def _sources(layout: GridLayout, stage: int, tokens: TokenPlacement, destination: np.ndarray) -> np.ndarray:
    """Rank that sends each token: its holder, or among replicas the destination itself, else the one at `shard`."""
    source = _ranks(layout, stage, tokens.shard, tokens.dp)
    if tokens.replicated:
        for tp in range(layout.tp):
            replica = _ranks(layout, stage, np.full_like(tokens.dp, tp), tokens.dp)
            source = np.where(replica == destination, destination, source)
    return source
