"""A parallel layout as plain data: which rank is where on its model's grid, and which layers it holds.

No torch and no process groups here, so that a layout of thousands of ranks can be checked and planned on a laptop.

Legend: ranks are global; `tp`, `pp`, `dp` are coordinates on the grid's axes; layers are 1-based global ids; a stage is
one pipeline rank. Ranks run along tp first, then dp, then pp (mcore's default order tp-cp-ep-dp-pp).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from oprd_megatron.config.schema import ParallelConfig
from oprd_megatron.errors import LayoutError


@dataclass(frozen=True)
class Coords:
    """A rank's place on its grid."""

    tp: int
    pp: int
    dp: int


@dataclass(frozen=True)
class GridLayout:
    """One model's grid.

    Attributes:
        tp, pp, dp: sizes of the axes.
        sp: activations outside the tensor-parallel regions are split along tokens over tp.
        layers_per_stage: layers on each stage, first to last; their sum is the model's depth.
        first_rank: global rank of the grid's first rank.
    """

    tp: int
    pp: int
    dp: int
    sp: bool
    layers_per_stage: tuple[int, ...]
    first_rank: int = 0

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def num_layers(self) -> int:
        return sum(self.layers_per_stage)

    def rank(self, coords: Coords) -> int:
        """Global rank at these coordinates."""
        return self.first_rank + coords.tp + self.tp * (coords.dp + self.dp * coords.pp)

    def coords(self, rank: int) -> Coords:
        """Coordinates of a global rank of this grid."""
        local = rank - self.first_rank
        assert 0 <= local < self.num_ranks, f"rank {rank} is not on this grid"
        return Coords(tp=local % self.tp, dp=local // self.tp % self.dp, pp=local // (self.tp * self.dp))

    def layers_of(self, stage: int) -> range:
        """1-based ids of the layers on a stage."""
        end = list(accumulate(self.layers_per_stage))[stage]
        return range(end - self.layers_per_stage[stage] + 1, end + 1)

    def stage_of(self, layer: int) -> int:
        """Stage that holds a layer (1-based id)."""
        for stage, end in enumerate(accumulate(self.layers_per_stage)):
            if layer <= end:
                return stage
        raise AssertionError(f"layer {layer} of {self.num_layers}")


def resolve_layout(
    parallel: ParallelConfig, *, name: str, world_size: int, num_layers: int, divisible: dict[str, int]
) -> GridLayout:
    """Fill in what the config leaves open and check that the layout can work.

    Args:
        parallel: the config's section.
        name: section name for errors, e.g. `student.parallel`.
        world_size: ranks there are.
        num_layers: depth of the model.
        divisible: what tp has to divide: {name: size}.

    Raises:
        LayoutError: one line with the product or divisor that failed.
    """
    tp, pp = parallel.tp, parallel.pp
    dp = parallel.dp or max(1, world_size // (tp * pp))
    if tp * pp * dp != world_size:
        raise LayoutError(
            f"{name}: tp {tp} x pp {pp} x dp {dp} = {tp * pp * dp}, but {world_size} ranks; "
            f"start {tp * pp * dp} ranks or change {name}"
        )
    for what, size in divisible.items():
        if size % tp:
            fits = [n for n in range(1, size + 1) if size % n == 0]
            raise LayoutError(f"{name}: tp {tp} does not divide {size} {what}; tp can be {fits[:8]}")
    if pp > num_layers:
        raise LayoutError(f"{name}: pp {pp} is more than the model's {num_layers} layers; use pp <= {num_layers}")
    if parallel.layers_per_stage is None:
        base, extra = divmod(num_layers, pp)
        stages = tuple(base + (stage < extra) for stage in range(pp))
    else:
        stages = tuple(parallel.layers_per_stage)
    if sum(stages) != num_layers:
        raise LayoutError(
            f"{name}.layers_per_stage: {' + '.join(map(str, stages))} = {sum(stages)}, but the model has {num_layers} layers"
        )
    return GridLayout(tp=tp, pp=pp, dp=dp, sp=parallel.sp, layers_per_stage=stages)
