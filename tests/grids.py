"""Small teacher and student grids, and what lies on them from first principles, to test the routing against.

`codes` says which (sample, position) every element of a rank's block is, straight from the conventions (samples packed one
after the other; context-parallel rank r of cp has parts r and 2 * cp - 1 - r of every sample; sequence parallelism cuts what
a rank has into tp pieces), without asking the code under test.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from hypothesis import strategies as st

from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.parallel import Coords, GridLayout
from oprd_megatron.representation.batch import Planner, Sample
from oprd_megatron.representation.layer_map import LayerPair, resolve_layer_pairs
from oprd_megatron.representation.placement import Arrangement, TokenPlacement, arrange, place_tokens
from oprd_megatron.representation.positions import supervised_positions
from oprd_megatron.representation.route import Route, Transfer, plan_route

CODE = 1000
"""A token's code is sample * CODE + position."""
FILL = -1
"""Code of what only fills a pack up."""


def grid(
    tp: int, pp: int, dp: int, layers: tuple[int, ...], *, sp: bool = False, at: int = 0, cp: int = 1, vpp: int = 1
) -> GridLayout:
    """A layout in few letters."""
    return GridLayout(tp, pp, dp, sp, layers, first_rank=at, cp=cp, vpp=vpp)


def filled(codes: Iterable[int], multiple: int) -> list[int]:
    """Codes with as much FILL after them as makes their number a multiple; at least one multiple."""
    codes = list(codes)
    return codes + [FILL] * (max(1, math.ceil(len(codes) / multiple)) * multiple - len(codes))


@dataclass(frozen=True)
class Side:
    """One model's grid, with its samples and where the tokens lie."""

    layout: GridLayout
    lengths: Sequence[int]
    arrangement: Arrangement
    tokens: TokenPlacement

    def segments(self, dp: int, micro_batch: int) -> list[list[int]]:
        """Codes of a whole pack, sample by sample, each with its fill; what fills up the pack is a segment of its own."""
        layout = self.layout
        share = 2 * layout.cp if layout.cp > 1 else 1
        found = [
            filled((sample * CODE + position for position in range(self.lengths[sample])), share)
            for sample in self.arrangement.packs[dp][micro_batch].samples
        ]
        whole = list(itertools.chain(*found))
        tail = filled(whole, math.lcm(share, layout.cp * layout.tp) if layout.sp else share)[len(whole) :]
        return [*found, tail] if tail else found

    def codes(self, coords: Coords, micro_batch: int) -> np.ndarray:
        """Codes of the block that this rank holds: [P_local]."""
        cp, kept = self.layout.cp, []
        for segment in self.segments(coords.dp, micro_batch):
            parts = np.split(np.array(segment), 2 * cp) if cp > 1 else [np.array(segment)]
            kept += [parts[coords.cp], parts[2 * cp - 1 - coords.cp]] if cp > 1 else parts
        share = np.concatenate(kept)
        return np.split(share, self.layout.tp)[coords.tp] if self.layout.sp else share


@dataclass(frozen=True)
class Case:
    """A batch, two grids and the plan between them.

    Attributes:
        lengths: (prompt, response) tokens of every sample.
        micro_batch_sizes: the teacher's, the student's.
        micro_batch_tokens: dynamic batching on both instead.
        output_bytes: bytes that travel of the teacher's prediction of each response token; 0 if none do.
    """

    lengths: Sequence[tuple[int, int]]
    teacher_layout: GridLayout
    student_layout: GridLayout
    micro_batch_sizes: tuple[int, int] = (1, 1)
    config: DistillConfig = field(default_factory=lambda: DistillConfig(positions="all"))
    micro_batch_tokens: int | None = None
    output_bytes: int = 0

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
    def route(self) -> Route:
        teacher, student = self.teacher, self.student
        return plan_route(self.pairs, teacher.layout, teacher.tokens, student.layout, student.tokens)

    @cached_property
    def transfers(self) -> list[Transfer]:
        return self.route.transfers()

    def _side(self, layout: GridLayout, micro_batch_size: int) -> Side:
        lengths = [prompt + response for prompt, response in self.lengths]
        arrangement = arrange(lengths, layout, micro_batch_size, self.micro_batch_tokens)
        return Side(layout, lengths, arrangement, place_tokens(self.positions, arrangement, layout))

    @cached_property
    def outputs(self) -> Case:
        """What travels of the teacher's predictions, as a case of its own: the states of the last layers that predict."""
        last = {self.student_layout.num_layers: self.teacher_layout.num_layers}
        config = DistillConfig(positions="all", position_anchor="predictor", layer_map=last)
        return replace(self, config=config, output_bytes=0)

    def held_bytes(self, state_bytes: int) -> dict[int, int]:
        """{rank: bytes} of states and predictions."""
        held = Counter(self.route.held_bytes(state_bytes))
        return held + Counter(self.outputs.route.held_bytes(self.output_bytes)) if self.output_bytes else held

    @property
    def samples(self) -> list[Sample]:
        """The batch as rollouts; ids do not matter here."""
        return [Sample((0,) * prompt, (0,) * response) for prompt, response in self.lengths]

    def planner(self, state_bytes: int, **distill: object) -> Planner:
        """What plans such batches in a run, both models with the teacher's micro-batch size."""
        return Planner(
            self.pairs,
            self.teacher_layout,
            self.student_layout,
            DistillConfig(**{**self.config.model_dump(), **distill}),
            state_bytes,
            self.micro_batch_sizes[0],
            self.micro_batch_tokens,
            predicted=predicted if self.output_bytes else None,
            output_bytes=self.output_bytes,
        )

    def needed(self, rank: int) -> dict[tuple[int, int], list[int]]:
        """{(student micro-batch, teacher layer): codes} of the targets a student rank needs, ascending."""
        side = self.student
        found: dict[tuple[int, int], list[int]] = {}
        if rank not in side.layout.ranks:
            return found
        coords = side.layout.coords(rank)
        here = set(side.layout.layers_of(coords.pp))
        layers = {pair.teacher_layer for pair in self.pairs if pair.student_layer in here}
        mine = {code for code, dp, cp, shard in zip(self.codes, side.tokens.dp, side.tokens.cp, side.tokens.shard, strict=True)
                if (dp, cp, shard) == (coords.dp, coords.cp, coords.tp)}  # fmt: skip
        for micro_batch in range(side.arrangement.num_micro_batches):
            codes = sorted(mine.intersection(side.codes(coords, micro_batch).tolist()))
            found |= {(micro_batch, layer): codes for layer in layers if codes}
        return found

    def held(self, rank: int, layer: int) -> dict[int, int]:
        """{code: micro-batch} of the tokens whose state of a teacher layer this rank computes, fill included."""
        side = self.teacher
        if rank not in side.layout.ranks:
            return {}
        coords = side.layout.coords(rank)
        if layer not in side.layout.layers_of(coords.pp):
            return {}
        return {int(code): micro_batch for micro_batch in range(side.arrangement.num_micro_batches)
                for code in side.codes(coords, micro_batch)}  # fmt: skip

    def lacking(self, rank: int) -> int:
        """States that a student rank needs and does not compute itself: the least that can travel to it."""
        counts: Counter[int] = Counter()
        for (_, layer), codes in self.needed(rank).items():
            here = self.held(rank, layer)
            counts[layer] += sum(code not in here for code in codes)
        return counts.total()


def predicted(sample: Sample) -> range:
    """The response tokens of a sample that some state predicts: not the first one after an empty prompt."""
    return range(0 if sample.prompt_ids else 1, len(sample.response_ids))


def places(layout: GridLayout) -> list[Coords]:
    """Every coordinate of a grid."""
    sizes = (layout.tp, layout.pp, layout.dp, layout.cp)
    return [Coords(*place) for place in itertools.product(*map(range, sizes))]


def random_layout(rng: random.Random, most: int = 72, first_ranks: Sequence[int] = (0, 0, 1, 4, 18)) -> GridLayout:
    """At most `most` ranks (up to 3 x 2 x 3 x 2), uneven stages, virtual or not, anywhere in the world."""
    sizes = {"tp": 3, "cp": 2, "pp": 3, "dp": 2}
    names = list(sizes)
    rng.shuffle(names)  # so that no axis is favoured where ranks are few
    for name in names:
        sizes[name] = rng.randint(1, min(sizes[name], most))
        most //= sizes[name]
    vpp = rng.randint(1, 2) if sizes["pp"] > 1 else 1
    return GridLayout(
        **sizes, vpp=vpp, sp=sizes["tp"] > 1 and rng.random() < 0.5, first_rank=rng.choice(first_ranks),
        layers_per_stage=tuple(rng.randint(1, 3 if vpp == 1 else 2) for _ in range(sizes["pp"] * vpp)),
    )  # fmt: skip


def random_case(rng: random.Random, world: int | None = None, where: Sequence[str] = ("same", "any")) -> Case:
    """Two grids with ragged rollouts (empty ones too), batched by number or by tokens, and any layer pairs.

    Args:
        rng: what is drawn from.
        world: ranks there are; None for grids that may lie anywhere.
        where: to choose from: "same" ranks, in the same layout or in another of as many ranks; "disjoint" ranks; "any".
    """
    chosen = rng.choice(where)
    if world is None:
        teacher, student = random_layout(rng), random_layout(rng)
    elif chosen == "disjoint":
        teacher = random_layout(rng, world - 1, [0])
        student = random_layout(rng, world - teacher.num_ranks, [0])
        first = rng.randint(0, 1)  # which of them begins at rank 0
        teacher = moved(teacher, first * student.num_ranks)
        student = moved(student, (1 - first) * teacher.num_ranks)
    else:
        teacher, student = random_layout(rng, world, [0]), random_layout(rng, world, [0])
        teacher = moved(teacher, rng.randint(0, world - teacher.num_ranks))
        student = moved(student, rng.randint(0, world - student.num_ranks))
    if chosen == "same":
        while student.num_ranks != teacher.num_ranks:
            again = world is None or rng.random() < 0.3
            student = teacher if again else random_layout(rng, teacher.num_ranks, [0])
        student = moved(student, teacher.first_rank)
    micro_batch_tokens = rng.choice([None, None, 6, 12, 30])
    sizes = rng.randint(1, 3), rng.randint(1, 3)
    unit = math.lcm(sizes[0] * teacher.dp, sizes[1] * student.dp)
    count = rng.randint(1, 8) if micro_batch_tokens else unit * rng.randint(1, max(1, 8 // unit))
    pairs = {rng.randint(1, student.num_layers): rng.randint(1, teacher.num_layers) for _ in range(rng.randint(1, 4))}
    config = DistillConfig(
        layer_map=rng.choice(["proportional", pairs]),
        positions=rng.choice(["all", "last", "last_k", "first_k"]),
        k=rng.randint(1, 4),
        position_anchor=rng.choice(["token", "predictor"]),
    )
    lengths = [(rng.randint(0, 5), rng.randint(0, 6)) for _ in range(count)]
    return Case(lengths, teacher, student, sizes, config, micro_batch_tokens)


def moved(layout: GridLayout, first_rank: int) -> GridLayout:
    """The same layout on other ranks."""
    return replace(layout, first_rank=first_rank)


def layouts() -> st.SearchStrategy[GridLayout]:
    """`random_layout`, drawn (and shrunk) by hypothesis."""
    return st.randoms(use_true_random=False).map(random_layout)


def cases(world: int | None = None) -> st.SearchStrategy[Case]:
    """`random_case`, drawn (and shrunk) by hypothesis."""
    return st.randoms(use_true_random=False).map(lambda rng: random_case(rng, world))
