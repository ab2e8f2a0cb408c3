"""The routing plan: which teacher rank sends which tokens of which layers to which student rank.

The plan is data. It is a pure function of both grids, both arrangements, the layer pairs and the supervised positions;
it can be printed and tested without a process group, and every rank computes the same one, so that nobody has to
negotiate. `exchange.py` executes it.

A student rank needs, for each supervised layer on its stage, the teacher's states at the tokens that it supervises
(`TokenPlacement.shard`). Each (token, layer) travels at most once to the one rank that needs it, also if it supervises two
student layers there. Where the teacher's state is replicated over its tensor-parallel ranks the student rank itself is chosen
as the source if it is one of them: what is already there does not travel.

How it is computed. Tokens that agree on all their coordinates on both grids but the stage form a group. A group's tokens stay
together whatever the stages, and a stage only shifts ranks by a constant. So the tokens are grouped once, and a transfer
is a (group, teacher stage, student stage): arrays, not objects, so that a plan for a thousand ranks takes seconds. A student
rank keeps its rows in the order of the groups, which makes every transfer a contiguous slice of what it receives.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
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
        teacher_stage: where the layers are.
        teacher_layers: ascending; the block is [n, len(teacher_layers), D].
        teacher_micro_batch, student_micro_batch: where the tokens are on either side.
        tokens: supervised token numbers, in the order of the student's rows; shape [n].
        first_row: where the block's rows begin among the destination's rows of that micro-batch.
    """

    source: int
    destination: int
    teacher_stage: int
    teacher_layers: tuple[int, ...]
    teacher_micro_batch: int
    student_micro_batch: int
    tokens: np.ndarray
    first_row: int

    @property
    def num_states(self) -> int:
        """States in the block: one a token and layer."""
        return len(self.teacher_layers) * len(self.tokens)


@dataclass(frozen=True)
class Route:
    """The plan of one batch. Arrays run over its K transfers, in the same order on every rank.

    Attributes:
        order: token numbers [M], group by group; a rank's rows of a micro-batch are in this order.
        starts, stops: the transfer's tokens are order[start:stop]; [K] each.
        first_row: as in `Transfer`; [K].
        source, destination, teacher_stage, student_stage, teacher_micro_batch, student_micro_batch: [K] each.
        num_layers: teacher layers in the transfer; [K].
        layers: {(teacher stage, student stage): teacher layers that go from one to the other}.
    """

    order: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    first_row: np.ndarray
    source: np.ndarray
    destination: np.ndarray
    teacher_stage: np.ndarray
    student_stage: np.ndarray
    teacher_micro_batch: np.ndarray
    student_micro_batch: np.ndarray
    num_layers: np.ndarray
    layers: dict[tuple[int, int], tuple[int, ...]]

    def transfers(self, rank: int | None = None) -> list[Transfer]:
        """The transfers from or to a rank, or all of them."""
        touched = slice(None) if rank is None else (self.source == rank) | (self.destination == rank)
        return [self._transfer(int(number)) for number in np.arange(len(self.source))[touched]]

    def _transfer(self, number: int) -> Transfer:
        stages = int(self.teacher_stage[number]), int(self.student_stage[number])
        return Transfer(
            source=int(self.source[number]),
            destination=int(self.destination[number]),
            teacher_stage=stages[0],
            teacher_layers=self.layers[stages],
            teacher_micro_batch=int(self.teacher_micro_batch[number]),
            student_micro_batch=int(self.student_micro_batch[number]),
            tokens=self.order[self.starts[number] : self.stops[number]],
            first_row=int(self.first_row[number]),
        )

    @property
    def num_states(self) -> np.ndarray:
        """States of each transfer: tokens x layers; [K]."""
        return (self.stops - self.starts) * self.num_layers

    def bytes_by_link(self, state_bytes: int) -> dict[tuple[int, int], int]:
        """{(source, destination): bytes} for states of `state_bytes` each; what stays on its rank moves none."""
        moved = self.source != self.destination
        base = int(self.destination.max(initial=0)) + 1
        pairs, index = np.unique(self.source[moved] * base + self.destination[moved], return_inverse=True)
        totals = np.bincount(index, weights=self.num_states[moved], minlength=len(pairs))
        return {
            divmod(pair, base): int(total) * state_bytes
            for pair, total in zip(pairs.tolist(), totals.tolist(), strict=True)
        }

    def total_bytes(self, state_bytes: int) -> int:
        """Bytes that move between ranks, over the whole world."""
        return int(self.num_states[self.source != self.destination].sum()) * state_bytes

    def held_bytes(self, state_bytes: int) -> dict[int, int]:
        """{rank: bytes of teacher states that it holds}: what it sends and what its own loss needs (counted once)."""
        held: dict[int, int] = defaultdict(int)
        remote = self.source != self.destination
        for ranks, states in ((self.destination, self.num_states), (self.source[remote], self.num_states[remote])):
            for rank, total in enumerate(np.bincount(ranks, weights=states).tolist() if len(ranks) else []):
                if total:
                    held[rank] += int(total) * state_bytes
        return dict(held)


_COLUMNS = (
    "starts", "stops", "first_row", "source", "destination", "teacher_stage", "student_stage", "teacher_micro_batch",
    "student_micro_batch", "num_layers",
)  # fmt: skip


def plan_route(
    pairs: Sequence[LayerPair],
    teacher: GridLayout,
    teacher_tokens: TokenPlacement,
    student: GridLayout,
    student_tokens: TokenPlacement,
) -> Route:
    """Plan the exchange of one global batch.

    Args:
        pairs: supervised layers.
        teacher, student: the grids.
        teacher_tokens, student_tokens: where the same M tokens lie on either grid.
    """
    groups = _group(teacher_tokens, student_tokens)
    block_starts = _starts(groups.keys_by_token[:4])
    first_rows = groups.starts - block_starts[np.searchsorted(block_starts, groups.starts, side="right") - 1]
    layers = layers_between(pairs, teacher, student)
    columns: dict[str, list[np.ndarray]] = {name: [np.zeros(0, dtype=np.int64)] for name in _COLUMNS}
    for (teacher_stage, student_stage), moved in layers.items():
        source, destination = groups.endpoints(teacher, teacher_stage, student, student_stage)
        values = (
            groups.starts, groups.stops, first_rows, source, destination, np.full_like(source, teacher_stage),
            np.full_like(source, student_stage), groups.keys[6], groups.keys[2], np.full_like(source, len(moved)),
        )  # fmt: skip
        for name, column in zip(_COLUMNS, values, strict=True):
            columns[name].append(column)
    return Route(order=groups.order, layers=layers, **{name: np.concatenate(parts) for name, parts in columns.items()})


def moved_tokens(
    teacher: GridLayout, teacher_tokens: TokenPlacement, student: GridLayout, student_tokens: TokenPlacement
) -> np.ndarray:
    """Tokens whose state would change ranks if a layer of teacher stage a taught a layer of student stage b: [a, b]."""
    groups = _group(teacher_tokens, student_tokens)
    sizes, moved = groups.stops - groups.starts, np.zeros((teacher.pp, student.pp), dtype=np.int64)
    for a in range(teacher.pp):
        for b in range(student.pp):
            source, destination = groups.endpoints(teacher, a, student, b)
            moved[a, b] = sizes[source != destination].sum()
    return moved


@dataclass(frozen=True)
class _Groups:
    """Tokens that agree on all coordinates but the stage. Keys are the student's dp, cp, micro-batch, shard, then the
    teacher's; the student's come first, so that a rank's rows of a micro-batch are contiguous.

    Attributes:
        order: token numbers, group by group; [M].
        keys_by_token: [8, M], in that order.
        starts, stops: of each group in `order`; [G].
        keys: [8, G].
        replicated: the teacher's states are replicated over its tensor-parallel ranks.
    """

    order: np.ndarray
    keys_by_token: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    keys: np.ndarray
    replicated: bool

    def endpoints(
        self, teacher: GridLayout, teacher_stage: int, student: GridLayout, student_stage: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(source rank, destination rank) of each group between two stages."""
        destination = _ranks(student, student_stage, *self.keys[[0, 1, 3]])
        source = _ranks(teacher, teacher_stage, *self.keys[[4, 5, 7]])
        if self.replicated:
            first = source - self.keys[7]
            source = np.where((destination >= first) & (destination < first + teacher.tp), destination, source)
        return source, destination


def _group(teacher: TokenPlacement, student: TokenPlacement) -> _Groups:
    keys = np.stack(
        [array for side in (student, teacher) for array in (side.dp, side.cp, side.micro_batch, side.shard)]
    )
    order = np.lexsort((student.row, *keys[::-1]))
    by_token = keys[:, order]
    starts = _starts(by_token)
    stops = np.append(starts[1:], len(order))[: len(starts)]
    return _Groups(order, by_token, starts, stops, by_token[:, starts], teacher.replicated)


def layers_between(
    pairs: Iterable[LayerPair], teacher: GridLayout, student: GridLayout
) -> dict[tuple[int, int], tuple[int, ...]]:
    """{(teacher stage, student stage): teacher layers that supervise layers of the student stage}, ascending."""
    together: dict[tuple[int, int], set[int]] = defaultdict(set)
    for pair in pairs:
        together[teacher.stage_of(pair.teacher_layer), student.stage_of(pair.student_layer)].add(pair.teacher_layer)
    return {stages: tuple(sorted(layers)) for stages, layers in sorted(together.items())}


def _starts(keys: np.ndarray) -> np.ndarray:
    """Where a new column begins among the sorted columns of keys [.., M]."""
    if keys.shape[1] == 0:
        return np.zeros(0, dtype=np.int64)
    return np.flatnonzero(np.concatenate([[True], np.any(np.diff(keys, axis=1), axis=0)]))


def _ranks(layout: GridLayout, stage: int, dp: np.ndarray, cp: np.ndarray, tp: np.ndarray) -> np.ndarray:
    """Global ranks at coordinates (tp[i], cp[i], stage, dp[i])."""
    base = layout.rank(Coords(tp=0, pp=stage, dp=0))
    return base + tp + layout.tp * (cp + layout.cp * dp)
