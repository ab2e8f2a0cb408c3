"""Layouts as data: who is where, which layers they hold, and what is wrong with a layout that cannot work."""

from __future__ import annotations

import itertools

import pytest
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.parallel_state import RankGenerator

from oprd_megatron.config.schema import ParallelConfig
from oprd_megatron.errors import LayoutError
from oprd_megatron.parallel import Coords, GridLayout, resolve_layout
from oprd_megatron.parallel.grid import AXES

SIZES = list(itertools.product((1, 2, 3), (1, 2, 4), (1, 2, 3), (0, 5)))
"""(tp, pp, dp, first_rank)"""


def grid(tp: int, pp: int, dp: int, first_rank: int) -> GridLayout:
    return GridLayout(tp, pp, dp, sp=False, layers_per_stage=(2,) * pp, first_rank=first_rank)


@pytest.mark.parametrize(("tp", "pp", "dp", "first_rank"), SIZES)
def test_rank_and_coords_are_inverse(tp: int, pp: int, dp: int, first_rank: int) -> None:
    """Every coordinate has one rank, every rank of the grid one coordinate, and no other rank has any."""
    layout = grid(tp, pp, dp, first_rank)
    places = [Coords(t, p, d) for t in range(tp) for p in range(pp) for d in range(dp)]
    assert sorted(layout.rank(place) for place in places) == list(range(first_rank, first_rank + layout.num_ranks))
    for place in places:
        assert layout.coords(layout.rank(place)) == place
    for outside in (first_rank - 1, first_rank + layout.num_ranks):
        with pytest.raises(AssertionError):
            layout.coords(outside)


@pytest.mark.parametrize(("tp", "pp", "dp", "first_rank"), SIZES)
def test_order_is_mcores(monkeypatch: pytest.MonkeyPatch, tp: int, pp: int, dp: int, first_rank: int) -> None:
    """tp fastest, then dp, then pp: the groups that these coordinates imply are those of mcore's rank enumerations."""
    layout = grid(tp, pp, dp, first_rank)
    monkeypatch.setenv("WORLD_SIZE", str(first_rank + layout.num_ranks))
    comm = HyperCommGrid([tp, 1, 1, dp, pp], AXES, rank_offset=first_rank)
    generator = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=1, order="tp-cp-ep-dp-pp", rank_offset=first_rank)
    sizes = {"tp": tp, "pp": pp, "dp": dp}
    for axes in (["tp"], ["dp"], ["pp"], ["tp", "pp"], ["tp", "dp"]):
        fixed = [axis for axis in sizes if axis not in axes]
        mine = set()
        for place in itertools.product(*(range(sizes[axis]) for axis in fixed)):
            inside = itertools.product(*(range(sizes[axis]) for axis in axes))
            members = [layout.rank(Coords(**dict(zip((*fixed, *axes), (*place, *i), strict=True)))) for i in inside]
            mine.add(tuple(sorted(members)))
        assert {tuple(sorted(ranks)) for ranks in comm.get_rank_enum(axes)} == mine
        assert {tuple(sorted(ranks)) for ranks in generator.get_ranks("-".join(axes))} == mine
        if len(axes) == 1:
            # The order inside a group is the coordinate: rank 0 of the pp group is the first stage.
            for ranks in comm.get_rank_enum(axes):
                assert [getattr(layout.coords(rank), axes[0]) for rank in ranks] == list(range(sizes[axes[0]]))


@pytest.mark.parametrize("layers_per_stage", [(1,), (5,), (2, 2), (3, 1), (1, 3, 2), (7, 1, 1, 4)])
def test_layers_and_stages_agree(layers_per_stage: tuple[int, ...]) -> None:
    """Stages hold 1..L in order, each as many layers as it is said to, and stage_of finds every layer there."""
    layout = GridLayout(2, len(layers_per_stage), 1, sp=False, layers_per_stage=layers_per_stage)
    stages = [list(layout.layers_of(stage)) for stage in range(layout.pp)]
    assert [len(layers) for layers in stages] == list(layers_per_stage)
    assert list(itertools.chain(*stages)) == list(range(1, layout.num_layers + 1))
    for stage, layers in enumerate(stages):
        assert [layout.stage_of(layer) for layer in layers] == [stage] * len(layers)
    with pytest.raises(AssertionError):
        layout.stage_of(layout.num_layers + 1)


def resolve(parallel: ParallelConfig, world_size: int, num_layers: int = 6, **divisible: int) -> GridLayout:
    return resolve_layout(
        parallel, name="student.parallel", world_size=world_size, num_layers=num_layers, divisible=divisible
    )


@pytest.mark.parametrize(
    ("parallel", "world_size", "num_layers", "expected"),
    [
        (ParallelConfig(), 1, 6, (1, 1, 1, (6,))),
        (ParallelConfig(), 5, 6, (1, 1, 5, (6,))),
        (ParallelConfig(tp=2, pp=2), 12, 6, (2, 2, 3, (3, 3))),
        (ParallelConfig(pp=4), 4, 6, (1, 4, 1, (2, 2, 1, 1))),
        (ParallelConfig(pp=3), 3, 28, (1, 3, 1, (10, 9, 9))),
        (ParallelConfig(pp=6, dp=1), 6, 6, (1, 6, 1, (1,) * 6)),
        (ParallelConfig(pp=2, layers_per_stage=[5, 1]), 2, 6, (1, 2, 1, (5, 1))),
    ],
)
def test_what_the_config_leaves_open(
    parallel: ParallelConfig, world_size: int, num_layers: int, expected: tuple
) -> None:
    """dp is what remains of the ranks; layers are spread evenly, the first stages taking what is left over."""
    layout = resolve(parallel, world_size, num_layers, heads=12)
    assert (layout.tp, layout.pp, layout.dp, layout.layers_per_stage) == expected
    assert (layout.num_ranks, layout.num_layers, layout.first_rank) == (world_size, num_layers, 0)


def test_sequence_parallelism_is_kept() -> None:
    """sp reaches the layout."""
    assert resolve(ParallelConfig(tp=2, sp=True), 2).sp
    assert not resolve(ParallelConfig(tp=2), 2).sp


@pytest.mark.parametrize(
    ("parallel", "world_size", "numbers"),
    [
        (ParallelConfig(tp=4, pp=2, dp=3), 16, "tp 4 x pp 2 x dp 3 = 24, but 16 ranks"),
        (ParallelConfig(tp=2), 3, "tp 2 x pp 1 x dp 1 = 2, but 3 ranks; start 2 ranks"),
        (ParallelConfig(tp=2, pp=2), 2, "tp 2 x pp 2 x dp 1 = 4, but 2 ranks"),
        (ParallelConfig(dp=2), 1, "tp 1 x pp 1 x dp 2 = 2, but 1 ranks"),
        (ParallelConfig(tp=5), 5, "tp 5 does not divide 12 heads; tp can be [1, 2, 3, 4, 6, 12]"),
        (ParallelConfig(tp=3), 3, "tp 3 does not divide 2 groups; tp can be [1, 2]"),
        (ParallelConfig(pp=7), 7, "pp 7 is more than the model's 6 layers; use pp <= 6"),
        (ParallelConfig(pp=2, layers_per_stage=[3, 4]), 2, "layers_per_stage: 3 + 4 = 7, but the model has 6 layers"),
    ],
)
def test_layouts_that_cannot_work(parallel: ParallelConfig, world_size: int, numbers: str) -> None:
    """One line with the section and the product, divisor or sum that failed."""
    with pytest.raises(LayoutError) as caught:
        resolve(parallel, world_size, heads=12, groups=2)
    text = str(caught.value)
    assert text.startswith("student.parallel") and numbers in text and "\n" not in text, text
