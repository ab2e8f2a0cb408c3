"""A parallel layout as plain data: which rank is where on its model's grid, and which layers it holds.

No torch and no process groups here, so that a layout of thousands of ranks can be checked and planned on a laptop.

Legend: ranks are global; `tp`, `cp`, `dp`, `pp` are coordinates on the grid's axes; layers are 1-based global ids; a stage is
one pipeline rank. With virtual pipeline stages (vpp) a stage holds vpp chunks of layers: chunk c of stage s is number
c * pp + s in the model's order. Ranks run along tp first, then cp, dp, pp (mcore's default order tp-cp-ep-dp-pp).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from checkpoints_conversion.architecture import Architecture
from oprd_megatron.config.schema import ParallelConfig
from oprd_megatron.errors import LayoutError


@dataclass(frozen=True)
class Coords:
    """A rank's place on its grid."""

    tp: int
    pp: int
    dp: int
    cp: int = 0


@dataclass(frozen=True)
class GridLayout:
    """One model's grid.

    Attributes:
        tp, pp, dp, cp: sizes of the axes.
        sp: activations outside the tensor-parallel regions are split along tokens over tp.
        layers_per_stage: layers of each of the pp * vpp chunks, in the model's order; their sum is the model's depth.
        first_rank: global rank of the grid's first rank.
        vpp: chunks on each stage.
        token_multiple: packs are filled up until what a rank multiplies has a multiple of so many tokens, as fp8 needs.
    """

    tp: int
    pp: int
    dp: int
    sp: bool
    layers_per_stage: tuple[int, ...]
    first_rank: int = 0
    cp: int = 1
    vpp: int = 1
    token_multiple: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    @property
    def ranks(self) -> range:
        """Global ranks of this grid."""
        return range(self.first_rank, self.first_rank + self.num_ranks)

    @property
    def num_layers(self) -> int:
        return sum(self.layers_per_stage)

    def rank(self, coords: Coords) -> int:
        """Global rank at these coordinates."""
        return self.first_rank + coords.tp + self.tp * (coords.cp + self.cp * (coords.dp + self.dp * coords.pp))

    def coords(self, rank: int) -> Coords:
        """Coordinates of a global rank of this grid."""
        assert rank in self.ranks, f"rank {rank} is not on this grid"
        rest, tp = divmod(rank - self.first_rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        return Coords(tp=tp, pp=pp, dp=dp, cp=cp)

    def chunk_layers(self, stage: int, chunk: int) -> range:
        """1-based ids of the layers of one chunk of a stage."""
        number = chunk * self.pp + stage
        end = list(accumulate(self.layers_per_stage))[number]
        return range(end - self.layers_per_stage[number] + 1, end + 1)

    def layers_of(self, stage: int) -> list[int]:
        """1-based ids of the layers on a stage, over all its chunks, ascending."""
        return [layer for chunk in range(self.vpp) for layer in self.chunk_layers(stage, chunk)]

    def stage_of(self, layer: int) -> int:
        """Stage that holds a layer (1-based id)."""
        for number, end in enumerate(accumulate(self.layers_per_stage)):
            if layer <= end:
                return number % self.pp
        raise AssertionError(f"layer {layer} of {self.num_layers}")

    def spread(self, count: int) -> list[int]:
        """`count` of the ranks (all, if it is more), evenly spread."""
        count = min(count, self.num_ranks)
        return [self.ranks[index * self.num_ranks // count] for index in range(count)]

    def __str__(self) -> str:
        axes = [f"{name} {size}" for name, size in (("tp", self.tp), ("cp", self.cp), ("pp", self.pp)) if size > 1]
        axes += [f"vpp {self.vpp}"] if self.vpp > 1 else []
        return " x ".join([*axes, f"dp {self.dp}"]) + (" with sp" if self.sp else "")


def resolve_layout(
    parallel: ParallelConfig,
    *,
    name: str,
    world_size: int,
    num_layers: int,
    divisible: dict[str, int],
    layers_per_stage: tuple[int, ...] | None = None,
    token_multiple: int = 1,
) -> GridLayout:
    """Fill in what the config leaves open and check that the layout can work.

    Args:
        parallel: the config's section.
        name: section name for errors, e.g. `student.parallel`.
        world_size: ranks there are.
        num_layers: depth of the model.
        divisible: what tp has to divide: {name: size}.
        layers_per_stage: stands for the config's, if given (`follow_student`).
        token_multiple: of the layout.

    Raises:
        LayoutError: one line with the product or divisor that failed and the nearest layouts that fit.
    """
    num_ranks = parallel.num_ranks or world_size
    last_rank = parallel.first_rank + num_ranks - 1
    if last_rank >= world_size:
        raise LayoutError(
            f"{name}.ranks: {parallel.ranks} needs {last_rank + 1} ranks, but there are {world_size}; start more or name others"
        )
    tp, cp, pp = parallel.tp, parallel.cp, parallel.pp
    dp = parallel.dp or max(1, num_ranks // (tp * cp * pp))
    problem = None
    if tp * cp * pp * dp != num_ranks:
        factors = f"tp {tp} x cp {cp} x pp {pp} x dp {dp}" if cp > 1 else f"tp {tp} x pp {pp} x dp {dp}"
        problem = f"{factors} = {tp * cp * pp * dp}, but {num_ranks} ranks"
    for what, size in divisible.items():
        if problem is None and size % tp:
            problem = f"tp {tp} does not divide {size} {what}"
    if problem is None and pp * parallel.vpp > num_layers:
        chunks = f"pp {pp} x vpp {parallel.vpp} = {pp * parallel.vpp}" if parallel.vpp > 1 else f"pp {pp}"
        problem = f"{chunks} is more than the model's {num_layers} layers"
    if problem is not None:
        fits = nearest_layouts(parallel, num_ranks, num_layers, divisible)
        advice = (
            f"nearest that fit: {'; '.join(fits)}" if fits else f"nothing fits {num_ranks} ranks; use another number"
        )
        raise LayoutError(f"{name}: {problem}; {advice}")
    stages = layers_per_stage or _stages(parallel, name, num_layers)
    return GridLayout(
        tp=tp, pp=pp, dp=dp, sp=parallel.sp, layers_per_stage=stages, first_rank=parallel.first_rank, cp=cp, vpp=parallel.vpp,
        token_multiple=token_multiple,
    )  # fmt: skip


def tp_divisible(architecture: Architecture, pad_heads: bool) -> dict[str, int]:
    """What tp has to divide, by name, for `resolve_layout`."""
    features = {"MLP features": architecture.ffn_hidden_size}
    if pad_heads:
        return features
    hint = "(pad_heads: true would allow it)"
    return {
        f"attention heads {hint}": architecture.num_attention_heads,
        f"key/value heads {hint}": architecture.num_query_groups,
        **features,
    }


def check_experts(layout: GridLayout, architecture: Architecture, name: str) -> None:
    """Refuse to train experts with tensor parallelism but without sequence parallelism: see models/experts.py.

    Raises:
        LayoutError: names the section.
    """
    if architecture.experts is not None and layout.tp > 1 and not layout.sp:
        raise LayoutError(
            f"{name}: a mixture of experts trains with tp {layout.tp} only if activations are split too; set {name}.sp: true"
        )


def nearest_layouts(
    parallel: ParallelConfig, num_ranks: int, num_layers: int, divisible: dict[str, int], count: int = 3
) -> list[str]:
    """The layouts of `num_ranks` ranks that can work and are nearest to the one asked for (by the factors that change)."""
    wanted = (parallel.tp, parallel.cp, parallel.pp, parallel.dp or num_ranks)
    found = []
    for tp, cp, pp, dp in _factorisations(num_ranks):
        vpp = parallel.vpp if pp > 1 else 1
        if any(size % tp for size in divisible.values()) or pp * vpp > num_layers:
            continue
        weights = (1.0, 1.0, 1.0, 1.0 if parallel.dp else 0.0)
        distance = sum(
            weight * abs(math.log2(size / asked))
            for weight, size, asked in zip(weights, (tp, cp, pp, dp), wanted, strict=True)
        )
        shown_cp = f" x cp {cp}" if parallel.cp > 1 or cp > 1 else ""
        given_up = (" x vpp 1" if vpp < parallel.vpp else "") + (" without sp" if parallel.sp and tp == 1 else "")
        found.append((distance, f"tp {tp}{shown_cp} x pp {pp} x dp {dp}{given_up}"))
    return [text for _, text in sorted(found)[:count]]


def check_ranks(teacher: GridLayout, student: GridLayout, world_size: int) -> None:
    """Both models on the same ranks, or on disjoint ones; every rank has a model.

    Raises:
        LayoutError: ranks that overlap in part, or ranks without a model.
    """
    check_overlap(teacher, student, world_size)
    check_idle({"teacher": teacher, "student": student}, world_size)


def check_overlap(teacher: GridLayout, student: GridLayout, world_size: int) -> None:
    """Both models on the same ranks, or on disjoint ones.

    Raises:
        LayoutError: ranks that overlap in part.
    """
    spans = {name: f"{layout.ranks[0]}-{layout.ranks[-1]}" for name, layout in (("t", teacher), ("s", student))}
    shared = set(teacher.ranks) & set(student.ranks)
    if shared and teacher.ranks != student.ranks:
        after = teacher.ranks[-1] + 1
        advice = f"student.parallel.ranks: {after}-{world_size - 1}" if after < world_size else "leave both out"
        raise LayoutError(
            f"teacher.parallel.ranks {spans['t']} and student.parallel.ranks {spans['s']} overlap in part; "
            f"use the same ranks or disjoint ones, for example {advice}"
        )


def check_idle(layouts: dict[str, GridLayout], world_size: int) -> None:
    """Every rank has at least one of these models.

    Raises:
        LayoutError: ranks without a model.
    """
    idle = sorted(set(range(world_size)).difference(*(layout.ranks for layout in layouts.values())))
    if idle:
        spans = ", ".join(f"{name} on {layout.ranks[0]}-{layout.ranks[-1]}" for name, layout in layouts.items())
        raise LayoutError(
            f"{len(idle)} of {world_size} ranks have no model (the first is {idle[0]}; {spans}); name them in parallel.ranks "
            "or start fewer ranks"
        )


def _factorisations(number: int) -> Iterator[tuple[int, int, int, int]]:
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    for tp in divisors:
        for cp in divisors:
            for pp in divisors:
                if number % (tp * cp * pp) == 0:
                    yield tp, cp, pp, number // (tp * cp * pp)


def _stages(parallel: ParallelConfig, name: str, num_layers: int) -> tuple[int, ...]:
    """Layers of each chunk, in the model's order."""
    count = parallel.pp * parallel.vpp
    if isinstance(parallel.layers_per_stage, list):
        stages = parallel.layers_per_stage
        if sum(stages) != num_layers:
            raise LayoutError(
                f"{name}.layers_per_stage: {' + '.join(map(str, stages))} = {sum(stages)}, but the model has {num_layers} "
                f"layers; nearest that fits: {_nearest_sum(stages, num_layers)}"
            )
        return tuple(stages)
    first, last = parallel.first_stage_layers, parallel.last_stage_layers
    middle = count - (first is not None) - (last is not None)
    rest = num_layers - (first or 0) - (last or 0)
    if rest < middle or (middle == 0 and rest):
        raise LayoutError(
            f"{name}: first_stage_layers {first} and last_stage_layers {last} leave {rest} layers to {middle} other stages of "
            f"a model of {num_layers}; every stage needs at least one layer and every layer a stage"
        )
    even = even_stages(rest, middle)
    return (*([first] if first else []), *even, *([last] if last else []))


def even_stages(num_layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each stage, as even as they go; the first ones have one more."""
    base, extra = divmod(num_layers, stages) if stages else (0, 0)
    return tuple(base + (stage < extra) for stage in range(stages))


def _nearest_sum(stages: list[int], num_layers: int) -> list[int]:
    """`stages` with layers added to the smallest or taken from the largest until they sum to `num_layers`."""
    fitted = list(stages)
    while sum(fitted) != num_layers:
        grow = sum(fitted) < num_layers
        at = fitted.index(min(fitted) if grow else max(fitted))
        fitted[at] += 1 if grow else -1
    return fitted
