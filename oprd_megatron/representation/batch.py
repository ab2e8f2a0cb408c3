"""A global batch of rollouts, and everything about it that both models must agree on.

A batch is done in chunks, each a part of the samples with a routing plan of its own: as few as keep every rank's teacher
states under the spool's budget. Teacher and student on ranks of their own work at the same time on different chunks, so there
a batch has several chunks also without a budget.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.errors import ConfigError, DataError
from oprd_megatron.parallel.layout import GridLayout
from oprd_megatron.representation.layer_map import LayerPair
from oprd_megatron.representation.placement import Arrangement, TokenPlacement, arrange, place_tokens
from oprd_megatron.representation.positions import choose, predicting_positions, supervised_positions
from oprd_megatron.representation.route import Route, layers_between, plan_route

OVERLAP_CHUNKS = 8
"""Most chunks of a batch that are made only to let teacher and student overlap."""


@dataclass(frozen=True)
class TeacherText:
    """What a teacher with another tokenizer reads of a rollout, and which of its states stand beside which of the student's.

    Attributes:
        ids: prompt and response in the teacher's tokens.
        student_positions, teacher_positions: sequence indices of the states that can be compared, pair by pair, ascending.
    """

    ids: tuple[int, ...]
    student_positions: tuple[int, ...]
    teacher_positions: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """One rollout, as token ids.

    Attributes:
        prompt_ids, response_ids: the student's; both models read them unless `teacher` says otherwise.
        teacher: what a teacher with another tokenizer reads instead.
        teacher_prompt_ids: what a teacher with the same tokenizer reads instead of the prompt.
        kept: of the supervised states, in order, those that are used; left out, all.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    teacher: TeacherText | None = None
    teacher_prompt_ids: tuple[int, ...] | None = None
    kept: tuple[int, ...] | None = None

    @property
    def ids(self) -> tuple[int, ...]:
        """What the student reads."""
        return self.prompt_ids + self.response_ids

    @property
    def teacher_ids(self) -> tuple[int, ...]:
        """What the teacher reads."""
        return self._teacher_prompt + self.response_ids if self.teacher is None else self.teacher.ids

    @property
    def _teacher_prompt(self) -> tuple[int, ...]:
        return self.prompt_ids if self.teacher_prompt_ids is None else self.teacher_prompt_ids

    def positions(self, config: DistillConfig) -> tuple[Sequence[int], Sequence[int]]:
        """Sequence indices of the supervised states: (the teacher's, the student's), equally many."""
        teacher: Sequence[int]
        student: Sequence[int]
        if self.teacher is None:
            teacher, student = (
                supervised_positions(len(prompt), len(self.response_ids), config)
                for prompt in (self._teacher_prompt, self.prompt_ids)
            )
        else:
            chosen = choose(len(self.teacher.student_positions), config)
            student = self.teacher.student_positions[chosen.start : chosen.stop]
            teacher = self.teacher.teacher_positions[chosen.start : chosen.stop]
        if self.kept is None:
            return teacher, student
        return [teacher[index] for index in self.kept], [student[index] for index in self.kept]

    def predicting(self, response_indices: Sequence[int]) -> tuple[list[int], list[int]]:
        """Sequence indices of the states that predict these response tokens: (the teacher's, the student's). With one
        tokenizer."""
        teacher, student = len(self._teacher_prompt), len(self.prompt_ids)
        return predicting_positions(teacher, response_indices), predicting_positions(student, response_indices)


@dataclass(frozen=True)
class Side:
    """One model's arrangement of a chunk."""

    arrangement: Arrangement
    tokens: TokenPlacement


@dataclass(frozen=True)
class Outputs:
    """The M response tokens of a chunk whose predictions are looked at, sample by sample.

    Attributes:
        targets: their ids y_t; [M] int64.
        sample, index: which sample of the chunk, and which token of its response (0-based); [M].
        student: where the states that predict them lie on the student's grid.
        teacher: and on the teacher's; None where nothing of the teacher's is wanted.
        route: the plan from one last stage to the other; None without `teacher`.
        order: of the tokens on every rank.
    """

    targets: np.ndarray
    sample: np.ndarray
    index: np.ndarray
    student: TokenPlacement
    teacher: TokenPlacement | None
    route: Route | None
    order: np.ndarray


@dataclass(frozen=True)
class Chunk:
    """A part of a batch that goes through teacher, exchange and student at once.

    Attributes:
        samples: its rollouts, in order.
        teacher, student: either model's arrangement.
        route: the plan.
        outputs: predictions that are looked at, if there are any.
    """

    samples: Sequence[Sample]
    teacher: Side
    student: Side
    route: Route
    outputs: Outputs | None = None

    def held_bytes(self, state_bytes: int, output_bytes: int) -> dict[int, int]:
        """{rank: bytes of teacher states and outputs it allocates}; ranks that hold nothing are left out."""
        held = self.route.held_bytes(state_bytes)
        if self.outputs is not None and self.outputs.route is not None:
            for rank, more in self.outputs.route.held_bytes(output_bytes).items():
                held[rank] = held.get(rank, 0) + more
        return held

    def total_bytes(self, state_bytes: int, output_bytes: int) -> int:
        """Bytes that travel between ranks."""
        outputs = self.outputs.route if self.outputs is not None else None
        return self.route.total_bytes(state_bytes) + (outputs.total_bytes(output_bytes) if outputs is not None else 0)


@dataclass(frozen=True)
class BatchPlan:
    """What every rank computes alike about one global batch.

    Attributes:
        samples: the rollouts, in order.
        num_tokens: supervised tokens of the whole batch: the loss's global denominator.
        chunks: of the samples, in order.
    """

    samples: Sequence[Sample]
    num_tokens: int
    chunks: list[Chunk]


def filled_up(samples: Sequence[Sample], unit: int) -> list[Sample]:
    """Samples, and at the end as many without a response, which are not supervised, as make their number a multiple of
    `unit`."""
    filler = replace(samples[0], response_ids=(), kept=())
    return [*samples, *[filler] * (-len(samples) % unit)]


@dataclass(frozen=True)
class Planner:
    """Plans batches for two grids.

    Attributes:
        pairs: supervised layers.
        teacher, student: the grids.
        config: positions and the spool's budget.
        state_bytes: bytes of one state on the wire.
        micro_batch_size, micro_batch_tokens: as in `run`.
        predicted: response tokens (0-based) of a sample whose predictions are looked at; None without any.
        output_bytes: bytes that travel of the teacher's prediction of one token; 0 if none are wanted.
    """

    pairs: Sequence[LayerPair]
    teacher: GridLayout
    student: GridLayout
    config: DistillConfig
    state_bytes: int
    micro_batch_size: int
    micro_batch_tokens: int | None = None
    predicted: Callable[[Sample], Sequence[int]] | None = None
    output_bytes: int = 0

    def plan(self, samples: Sequence[Sample]) -> BatchPlan:
        """Cut a global batch into chunks, arrange them on both grids and route their states.

        Raises:
            DataError: no token of the batch is supervised.
            ConfigError: the smallest chunk that both grids can work on is over the budget.
        """
        num_tokens = self.num_tokens(samples)
        if num_tokens == 0:
            raise DataError(
                "no token of this batch is supervised: all responses are empty, or none of their tokens ends where one of the "
                "teacher's does; check rollout.stop and prompts"
            )
        units, rest = divmod(len(samples), self.unit)
        assert rest == 0, f"{len(samples)} samples, {self.unit} at a time"
        budget = self.config.spool_bytes
        count = self._overlap_chunks(units)
        while True:
            chunks = [self._chunk(samples[part]) for part in self._parts(len(samples), count)]
            largest = max(
                max(chunk.held_bytes(self.state_bytes, self.output_bytes).values(), default=0) for chunk in chunks
            )
            if budget is None:
                return BatchPlan(samples, num_tokens, chunks)
            room = budget if self._share_ranks else max(1, budget // 2)  # two chunks at a time overlap
            if largest <= room or (count == units and largest <= budget):
                return BatchPlan(samples, num_tokens, chunks)
            if count == units:
                raise ConfigError(
                    f"distill.spool_bytes: {int(budget)} is below one micro-batch's states; this batch needs at least {largest}"
                )
            count = min(units, max(count + 1, math.ceil(count * largest / room)))

    def num_tokens(self, samples: Sequence[Sample]) -> int:
        """Supervised tokens."""
        return sum(len(sample.positions(self.config)[1]) for sample in samples)

    def most_held_bytes(self, longest: Sample) -> int:
        """Upper bound of what a rank holds of the smallest chunk, whatever the samples, none longer than `longest`.

        With context or sequence parallelism all supervised tokens of a micro-batch may come to lie on one rank; else they
        are split evenly over tensor-parallel ranks.
        """
        alike = self._share_ranks and all(
            getattr(self.teacher, axis) == getattr(self.student, axis) for axis in ("tp", "cp", "dp", "pp", "sp")
        )
        held: tuple[dict[int, int], dict[int, int]] = (defaultdict(int), defaultdict(int))
        freight = [(self.pairs, len(longest.positions(self.config)[1]), self.state_bytes)]
        if self.predicted is not None and self.output_bytes:
            freight.append(([self._last_layers], len(self.predicted(longest)), self.output_bytes))
        for pairs, tokens_of_sample, size in freight:
            for stages, layers in layers_between(pairs, self.teacher, self.student).items():
                for side, layout in enumerate((self.teacher, self.student)):
                    samples = -(-self.unit // layout.dp)
                    size_of_pack = min(samples, self.micro_batch_size)
                    share = (
                        size_of_pack * tokens_of_sample
                    )  # of a micro-batch; tensor-parallel ranks split each of them
                    share = (samples // size_of_pack) * (share if layout.sp else -(-share // layout.tp))
                    if side == 1 or not (
                        alike and stages[0] == stages[1]
                    ):  # else it stays, and is the student's already
                        held[side][stages[side]] += share * len(layers) * size
        if alike:
            return max(held[0][stage] + held[1][stage] for stage in range(self.student.pp))
        most = [max(by_stage.values(), default=0) for by_stage in held]
        return sum(most) if self._share_ranks else max(most)

    def _overlap_chunks(self, units: int) -> int:
        """1 where teacher and student take turns on the same ranks; else enough to overlap, with pipelines still filled."""
        if self._share_ranks:
            return 1
        deepest = max(layout.pp * layout.vpp for layout in (self.teacher, self.student))
        return max(1, min(OVERLAP_CHUNKS, units // deepest))

    @property
    def _last_layers(self) -> LayerPair:
        return LayerPair(self.student.num_layers, self.teacher.num_layers)

    @property
    def _share_ranks(self) -> bool:
        return self.teacher.ranks == self.student.ranks

    @property
    def unit(self) -> int:
        """Samples that both grids can arrange evenly."""
        if self.micro_batch_tokens is not None:
            return 1
        return self.micro_batch_size * math.lcm(self.teacher.dp, self.student.dp)

    def _parts(self, count: int, parts: int) -> list[slice]:
        """`count` samples in parts of whole units, as even as they go."""
        units = count // self.unit
        bounds = [units * part // parts * self.unit for part in range(parts + 1)]
        return [slice(start, stop) for start, stop in pairwise(bounds)]

    def _chunk(self, samples: Sequence[Sample]) -> Chunk:
        lengths = [len(sample.teacher_ids) for sample in samples], [len(sample.ids) for sample in samples]
        positions = zip(*(sample.positions(self.config) for sample in samples), strict=True)
        sides = []
        for layout, read, supervised in zip((self.teacher, self.student), lengths, positions, strict=True):
            arrangement = arrange(read, layout, self.micro_batch_size, self.micro_batch_tokens)
            sides.append(Side(arrangement, place_tokens(supervised, arrangement, layout)))
        route = plan_route(self.pairs, self.teacher, sides[0].tokens, self.student, sides[1].tokens)
        return Chunk(
            samples, sides[0], sides[1], route, self._outputs(samples, sides[0].arrangement, sides[1].arrangement)
        )

    def _outputs(self, samples: Sequence[Sample], teacher: Arrangement, student: Arrangement) -> Outputs | None:
        if self.predicted is None:
            return None
        indices = [self.predicted(sample) for sample in samples]
        targets = np.array(
            [s.response_ids[i] for s, some in zip(samples, indices, strict=True) for i in some], np.int64
        )
        number = np.repeat(np.arange(len(samples)), [len(some) for some in indices])
        index = np.array([i for some in indices for i in some], np.int64)
        if not self.output_bytes:
            positions = [
                predicting_positions(len(s.prompt_ids), some) for s, some in zip(samples, indices, strict=True)
            ]
            tokens = place_tokens(positions, student, self.student)
            return Outputs(targets, number, index, tokens, None, None, np.arange(len(targets)))
        both = zip(*(sample.predicting(some) for sample, some in zip(samples, indices, strict=True)), strict=True)
        arrangements = (teacher, self.teacher), (student, self.student)
        sides = [place_tokens(positions, *place) for positions, place in zip(both, arrangements, strict=True)]
        route = plan_route([self._last_layers], self.teacher, sides[0], self.student, sides[1])
        return Outputs(targets, number, index, sides[1], sides[0], route, route.order)
