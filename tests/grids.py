"""Small teacher and student grids, and what lies on them from first principles, to test the routing against.

`codes` says which (sample, position) every element of a rank's block is, straight from the conventions (right-padded
[S, B] blocks, split along S under sequence parallelism), without asking the code under test.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from hypothesis import strategies as st

from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.parallel import Coords, GridLayout
from oprd_megatron.representation.layer_map import LayerPair, resolve_layer_pairs
from oprd_megatron.representation.placement import Arrangement, TokenPlacement, arrange, place_tokens
from oprd_megatron.representation.positions import supervised_positions
from oprd_megatron.representation.route import Transfer, plan_route

CODE = 1000
"""A token's code is sample * CODE + position."""


@dataclass(frozen=True)
class Side:
    """One model's grid and batch size, with where the tokens lie."""

    layout: GridLayout
    micro_batch_size: int
    arrangement: Arrangement
    tokens: TokenPlacement

    def ranks(self) -> range:
        return range(self.layout.first_rank, self.layout.first_rank + self.layout.num_ranks)

    def codes(self, dp: int, micro_batch: int, tp: int) -> np.ndarray:
        """Codes of the block that this rank holds: [S_local, B]."""
        samples = self.arrangement.samples[dp][micro_batch]
        length = self.arrangement.lengths[dp][micro_batch]
        whole = np.array([[sample * CODE + position for sample in samples] for position in range(length)])
        whole = whole.reshape(length, len(samples))
        return np.split(whole, self.layout.tp)[tp] if self.layout.sp else whole


@dataclass(frozen=True)
class Case:
    """A batch, two grids and the plan between them."""

    lengths: Sequence[tuple[int, int]]
    teacher_layout: GridLayout
    student_layout: GridLayout
    micro_batch_sizes: tuple[int, int] = (1, 1)
    """The teacher's, the student's."""
    config: DistillConfig = field(default_factory=lambda: DistillConfig(positions="all"))

    @cached_property
    def positions(self) -> list[range]:
        return [supervised_positions(prompt, response, self.config) for prompt, response in self.lengths]

    @cached_property
    def codes(self) -> list[int]:
        """Code of each supervised token, by token number: sample by sample."""
        return [sample * CODE + p for sample, positions in enumerate(self.positions) for p in positions]

    @cached_property
    def pairs(self) -> list[LayerPair]:
        return resolve_layer_pairs(self.config, self.student_layout.num_layers, self.teacher_layout.num_layers)

    @cached_property
    def teacher(self) -> Side:
        return self._side(self.teacher_layout, self.micro_batch_sizes[0])

    @cached_property
    def student(self) -> Side:
        return self._side(self.student_layout, self.micro_batch_sizes[1])

    @cached_property
    def transfers(self) -> list[Transfer]:
        teacher, student = self.teacher, self.student
        return plan_route(self.pairs, teacher.layout, teacher.tokens, student.layout, student.tokens)

    def _side(self, layout: GridLayout, micro_batch_size: int) -> Side:
        arrangement = arrange([prompt + response for prompt, response in self.lengths], layout, micro_batch_size)
        return Side(layout, micro_batch_size, arrangement, place_tokens(self.positions, arrangement, layout))

    def needed(self, rank: int) -> dict[tuple[int, int], list[int]]:
        """{(student micro-batch, teacher layer): codes} of the targets a student rank needs, ascending by its rows."""
        side, found = self.student, {}
        if rank not in side.ranks():
            return found
        coords = side.layout.coords(rank)
        here = set(side.layout.layers_of(coords.pp))
        layers = {pair.teacher_layer for pair in self.pairs if pair.student_layer in here}
        mine = {code for code, dp, shard in zip(self.codes, side.tokens.dp, side.tokens.shard, strict=True)
                if (dp, shard) == (coords.dp, coords.tp)}  # fmt: skip
        for micro_batch in range(side.arrangement.num_micro_batches):
            codes = [int(c) for c in side.codes(coords.dp, micro_batch, coords.tp).flatten() if c in mine]
            found |= {(micro_batch, layer): codes for layer in layers if codes}
        return found

    def held(self, rank: int, layer: int) -> dict[int, int]:
        """{code: micro-batch} of the tokens whose state of a teacher layer this rank computes, padding included."""
        side = self.teacher
        if rank not in side.ranks():
            return {}
        coords = side.layout.coords(rank)
        if layer not in side.layout.layers_of(coords.pp):
            return {}
        return {int(code): micro_batch for micro_batch in range(side.arrangement.num_micro_batches)
                for code in side.codes(coords.dp, micro_batch, coords.tp).flatten()}  # fmt: skip


def places(layout: GridLayout) -> list[Coords]:
    """Every coordinate of a grid."""
    return [Coords(t, p, d) for t, p, d in itertools.product(range(layout.tp), range(layout.pp), range(layout.dp))]


@st.composite
def layouts(draw: st.DrawFn) -> GridLayout:
    """Up to 3 x 3 x 2 ranks, uneven stages, anywhere in the world."""
    tp, pp = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return GridLayout(
        tp=tp, pp=pp, dp=draw(st.integers(1, 2)), sp=tp > 1 and draw(st.booleans()),
        layers_per_stage=tuple(draw(st.lists(st.integers(1, 3), min_size=pp, max_size=pp))),
        first_rank=draw(st.sampled_from([0, 0, 1, 4, 18])),
    )  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Two grids, equal or not, overlapping or disjoint, with ragged rollouts (empty ones too) and any layer pairs."""
    teacher = draw(layouts())
    student = draw(st.one_of(layouts(), st.just(teacher)))
    sizes = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    together = math.lcm(sizes[0] * teacher.dp, sizes[1] * student.dp)
    count = together * draw(st.integers(1, max(1, 8 // together)))
    length = st.tuples(st.integers(0, 5), st.integers(0, 6))
    lengths = draw(st.lists(length, min_size=count, max_size=count))
    explicit = st.dictionaries(
        st.integers(1, student.num_layers), st.integers(1, teacher.num_layers), min_size=1, max_size=4
    )
    config = DistillConfig(
        layer_map=draw(st.one_of(st.just("proportional"), explicit)),
        positions=draw(st.sampled_from(["all", "last", "last_k", "first_k"])),
        k=draw(st.integers(1, 4)),
        position_anchor=draw(st.sampled_from(["token", "predictor"])),
    )
    return Case(lengths, teacher, student, sizes, config)
