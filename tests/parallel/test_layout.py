"""Layouts as data: who is where, which layers they hold, and what is wrong with a layout that cannot work."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.parallel_state import RankGenerator

from checkpoints_conversion.architecture import Architecture
from oprd_megatron.config.schema import ParallelConfig
from oprd_megatron.errors import LayoutError
from oprd_megatron.parallel import Coords, GridLayout, check_ranks, resolve_layout, tp_divisible
from oprd_megatron.parallel.grid import AXES

SIZES = list(itertools.product((1, 2, 3), (1, 2), (1, 2, 4), (1, 2, 3), (0, 5)))
"""(tp, cp, pp, dp, first_rank)"""


def grid(tp: int, cp: int, pp: int, dp: int, first_rank: int) -> GridLayout:
    return GridLayout(tp, pp, dp, sp=False, layers_per_stage=(2,) * pp, first_rank=first_rank, cp=cp)


@pytest.mark.parametrize(("tp", "cp", "pp", "dp", "first_rank"), SIZES)
def test_rank_and_coords_are_inverse(tp: int, cp: int, pp: int, dp: int, first_rank: int) -> None:
    """Every coordinate has one rank, every rank of the grid one coordinate, and no other rank has any."""
    layout = grid(tp, cp, pp, dp, first_rank)
    places = [Coords(*place) for place in itertools.product(range(tp), range(pp), range(dp), range(cp))]
    assert sorted(layout.rank(place) for place in places) == list(layout.ranks)
    assert layout.ranks == range(first_rank, first_rank + tp * cp * pp * dp)
    for place in places:
        assert layout.coords(layout.rank(place)) == place
    for outside in (first_rank - 1, first_rank + layout.num_ranks):
        with pytest.raises(AssertionError):
            layout.coords(outside)


@pytest.mark.parametrize(("tp", "cp", "pp", "dp", "first_rank"), SIZES)
def test_order_is_mcores(monkeypatch: pytest.MonkeyPatch, tp: int, cp: int, pp: int, dp: int, first_rank: int) -> None:
    """tp fastest, then cp, dp, pp: the groups that these coordinates imply are those of mcore's rank enumerations."""
    layout = grid(tp, cp, pp, dp, first_rank)
    monkeypatch.setenv("WORLD_SIZE", str(first_rank + layout.num_ranks))
    comm = HyperCommGrid([tp, cp, 1, dp, pp], AXES, rank_offset=first_rank)
    generator = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order="tp-cp-ep-dp-pp", rank_offset=first_rank)
    sizes = {"tp": tp, "cp": cp, "pp": pp, "dp": dp}
    for axes in (["tp"], ["cp"], ["dp"], ["pp"], ["tp", "pp"], ["cp", "dp"], ["tp", "cp"], ["tp", "cp", "dp"]):
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


@pytest.mark.parametrize(
    ("pp", "vpp", "layers_per_stage", "by_stage"),
    [
        (2, 2, (1, 2, 3, 4), [[1, 4, 5, 6], [2, 3, 7, 8, 9, 10]]),
        (3, 2, (1, 1, 1, 2, 1, 1), [[1, 4, 5], [2, 6], [3, 7]]),
        (2, 3, (1,) * 6, [[1, 3, 5], [2, 4, 6]]),
    ],
)
def test_virtual_stages(pp: int, vpp: int, layers_per_stage: tuple[int, ...], by_stage: list[list[int]]) -> None:
    """Chunk c of stage s is number c * pp + s in the model's order."""
    layout = GridLayout(1, pp, 1, sp=False, layers_per_stage=layers_per_stage, vpp=vpp)
    assert [layout.layers_of(stage) for stage in range(pp)] == by_stage
    order = [layout.chunk_layers(stage, chunk) for chunk in range(vpp) for stage in range(pp)]
    assert [len(layers) for layers in order] == list(layers_per_stage)
    assert list(itertools.chain(*order)) == list(range(1, layout.num_layers + 1))
    for stage, layers in enumerate(by_stage):
        assert [layout.stage_of(layer) for layer in layers] == [stage] * len(layers)


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (GridLayout(1, 1, 3, False, (4,)), "dp 3"),
        (GridLayout(2, 2, 1, True, (2, 2)), "tp 2 x pp 2 x dp 1 with sp"),
        (GridLayout(2, 2, 1, False, (1, 1, 1, 1), cp=4, vpp=2), "tp 2 x cp 4 x pp 2 x vpp 2 x dp 1"),
    ],
)
def test_a_layout_as_text(layout: GridLayout, text: str) -> None:
    """Axes of size 1 are left out, dp is always there."""
    assert str(layout) == text


def resolve(parallel: ParallelConfig, world_size: int, num_layers: int = 6, **divisible: int) -> GridLayout:
    return resolve_layout(
        parallel, name="student.parallel", world_size=world_size, num_layers=num_layers, divisible=divisible
    )


def message(parallel: ParallelConfig, world_size: int, num_layers: int = 6, **divisible: int) -> str:
    """The one line that a layout costs that cannot work."""
    with pytest.raises(LayoutError) as caught:
        resolve(parallel, world_size, num_layers, **divisible)
    text = str(caught.value)
    assert text.startswith("student.parallel") and "\n" not in text, text
    return text


@pytest.mark.parametrize(
    ("parallel", "world_size", "num_layers", "expected"),
    [
        (ParallelConfig(), 1, 6, (1, 1, 1, 1, (6,))),
        (ParallelConfig(), 5, 6, (1, 1, 1, 5, (6,))),
        (ParallelConfig(tp=2, pp=2), 12, 6, (2, 1, 2, 3, (3, 3))),
        (ParallelConfig(tp=2, cp=3), 12, 6, (2, 3, 1, 2, (6,))),
        (ParallelConfig(pp=4), 4, 6, (1, 1, 4, 1, (2, 2, 1, 1))),
        (ParallelConfig(pp=3), 3, 28, (1, 1, 3, 1, (10, 9, 9))),
        (ParallelConfig(pp=6, dp=1), 6, 6, (1, 1, 6, 1, (1,) * 6)),
        (ParallelConfig(pp=2, layers_per_stage=[5, 1]), 2, 6, (1, 1, 2, 1, (5, 1))),
        (ParallelConfig(pp=2, vpp=2), 2, 6, (1, 1, 2, 1, (2, 2, 1, 1))),
        (ParallelConfig(pp=2, vpp=2, layers_per_stage=[1, 1, 1, 3]), 2, 6, (1, 1, 2, 1, (1, 1, 1, 3))),
        (ParallelConfig(pp=4, first_stage_layers=1), 4, 12, (1, 1, 4, 1, (1, 4, 4, 3))),
        (ParallelConfig(pp=4, last_stage_layers=2), 4, 12, (1, 1, 4, 1, (4, 3, 3, 2))),
        (ParallelConfig(pp=3, first_stage_layers=2, last_stage_layers=1), 3, 12, (1, 1, 3, 1, (2, 9, 1))),
        (ParallelConfig(pp=2, first_stage_layers=5, last_stage_layers=1), 2, 6, (1, 1, 2, 1, (5, 1))),
        (ParallelConfig(pp=2, vpp=2, first_stage_layers=1, last_stage_layers=1), 2, 6, (1, 1, 2, 1, (1, 2, 2, 1))),
    ],
)
def test_what_the_config_leaves_open(
    parallel: ParallelConfig, world_size: int, num_layers: int, expected: tuple
) -> None:
    """dp is what remains of the ranks; layers are spread evenly over the chunks that no key speaks of, the first of them taking
    what is left over."""
    layout = resolve(parallel, world_size, num_layers, heads=12)
    assert (layout.tp, layout.cp, layout.pp, layout.dp, layout.layers_per_stage) == expected
    assert (layout.num_ranks, layout.num_layers, layout.first_rank) == (world_size, num_layers, 0)
    assert layout.vpp == parallel.vpp


def test_sequence_parallelism_is_kept() -> None:
    """sp reaches the layout."""
    assert resolve(ParallelConfig(tp=2, sp=True), 2).sp
    assert not resolve(ParallelConfig(tp=2), 2).sp


def test_ranks_are_kept() -> None:
    """`ranks` says where the grid begins and how large it is; dp is what remains of those."""
    layout = resolve(ParallelConfig(tp=2, ranks="4-7"), 8)
    assert (layout.first_rank, layout.dp, layout.ranks) == (4, 2, range(4, 8))


@pytest.mark.parametrize(
    ("parallel", "world_size", "says"),
    [
        (ParallelConfig(tp=4, pp=2, dp=3), 16, "tp 4 x pp 2 x dp 3 = 24, but 16 ranks; nearest that fit: "),
        (ParallelConfig(tp=2), 3, "tp 2 x pp 1 x dp 1 = 2, but 3 ranks; nearest that fit: tp 1 x pp 1 x dp 3;"),
        (ParallelConfig(tp=2, pp=2), 2, "tp 2 x pp 2 x dp 1 = 4, but 2 ranks; nearest that fit: tp 1 x pp 2 x dp 1;"),
        (ParallelConfig(dp=2), 1, "tp 1 x pp 1 x dp 2 = 2, but 1 ranks; nearest that fit: tp 1 x pp 1 x dp 1"),
        (
            ParallelConfig(cp=4),
            6,
            "tp 1 x cp 4 x pp 1 x dp 1 = 4, but 6 ranks; nearest that fit: tp 1 x cp 3 x pp 1 x dp 2;",
        ),
        (ParallelConfig(tp=5), 5, "tp 5 does not divide 12 heads; nearest that fit: "),
        (ParallelConfig(tp=3), 3, "tp 3 does not divide 2 groups; nearest that fit: "),
        (ParallelConfig(pp=7), 7, "pp 7 is more than the model's 6 layers; nearest that fit: "),
        (ParallelConfig(pp=4, vpp=2), 4, "pp 4 x vpp 2 = 8 is more than the model's 6 layers; nearest that fit: "),
        (ParallelConfig(tp=2, ranks="0-2"), 8, "tp 2 x pp 1 x dp 1 = 2, but 3 ranks; nearest that fit: "),
        (
            ParallelConfig(pp=2, layers_per_stage=[3, 4]),
            2,
            ".layers_per_stage: 3 + 4 = 7, but the model has 6 layers; nearest that fits: [3, 3]",
        ),
        (
            ParallelConfig(pp=2, vpp=2, layers_per_stage=[1, 1, 1, 1]),
            2,
            ".layers_per_stage: 1 + 1 + 1 + 1 = 4, but the model has 6 layers; nearest that fits: [2, 2, 1, 1]",
        ),
        (
            ParallelConfig(pp=3, first_stage_layers=3, last_stage_layers=3),
            3,
            "first_stage_layers 3 and last_stage_layers 3 leave 0 layers to 1 other stages of a model of 6",
        ),
        (
            ParallelConfig(pp=2, first_stage_layers=3, last_stage_layers=1),
            2,
            "first_stage_layers 3 and last_stage_layers 1 leave 2 layers to 0 other stages of a model of 6",
        ),
        (
            ParallelConfig(pp=2, first_stage_layers=6),
            2,
            "first_stage_layers 6 and last_stage_layers None leave 0 layers",
        ),
        (ParallelConfig(ranks="4-9"), 8, ".ranks: 4-9 needs 10 ranks, but there are 8"),
    ],
)
def test_layouts_that_cannot_work(parallel: ParallelConfig, world_size: int, says: str) -> None:
    """One line with the section, the product, divisor or sum that failed, and what would do."""
    text = message(parallel, world_size, heads=12, groups=2)
    assert says in text, text


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 3)),
    dp=st.none() | st.integers(1, 5),
    sp=st.booleans(),
    world_size=st.integers(1, 24),
    num_layers=st.integers(1, 8),
    heads=st.integers(1, 12),
)
def test_what_is_advised_works(
    sizes: tuple[int, int, int, int], dp: int | None, sp: bool, world_size: int, num_layers: int, heads: int
) -> None:
    """Every layout that an error lists resolves as it is written there; they are different and at most three."""
    tp, cp, pp, vpp = sizes
    vpp, sp = vpp if pp > 1 else 1, sp and tp > 1
    parallel = ParallelConfig(tp=tp, cp=cp, pp=pp, vpp=vpp, dp=dp, sp=sp)
    try:
        resolve(parallel, world_size, num_layers, heads=heads)
    except LayoutError as error:
        listed = str(error).partition("nearest that fit: ")[2].split("; ")
    else:
        return
    assert len(listed) == len(set(listed)) <= 3
    for text in listed:
        given: dict[str, Any] = {name: int(size) for name, size in re.findall(r"\b(tp|cp|pp|vpp|dp) (\d+)", text)}
        advised = ParallelConfig(**{"vpp": vpp, "sp": sp and "without sp" not in text, **given})
        layout = resolve(advised, world_size, num_layers, heads=heads)
        assert layout.num_ranks == world_size == layout.tp * layout.cp * layout.pp * layout.dp


@given(stages=st.lists(st.integers(1, 9), min_size=1, max_size=6), num_layers=st.integers(6, 30))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_advised_stages_work(stages: list[int], num_layers: int) -> None:
    """A list of stages with the wrong sum gets one with the right sum that changes only up or only down."""
    if sum(stages) == num_layers:
        return
    text = message(ParallelConfig(pp=len(stages), layers_per_stage=stages), len(stages), num_layers)
    fitted = [int(size) for size in text.partition("nearest that fits: [")[2].rstrip("]").split(",")]
    resolve(ParallelConfig(pp=len(stages), layers_per_stage=fitted), len(stages), num_layers)
    differences = [b - a for a, b in zip(stages, fitted, strict=True)]
    assert all(d >= 0 for d in differences) or all(d <= 0 for d in differences)


ARCHITECTURE = Architecture("llama", 4, 64, 96, 9, 3, 16, 100, 128, 1e-5, 1e4, None, True, False, False)


def test_what_tp_divides() -> None:
    """Heads, key/value heads and MLP features, each with its own message; with padded heads the features only."""
    assert list(tp_divisible(ARCHITECTURE, pad_heads=True).values()) == [96]
    named = tp_divisible(ARCHITECTURE, pad_heads=False)
    assert sorted(named.values()) == [3, 9, 96]
    for tp, what in ((2, "9 attention heads"), (9, "3 key/value heads")):
        with pytest.raises(LayoutError, match=rf"tp {tp} does not divide {what} \(pad_heads: true would allow it\)"):
            resolve_layout(ParallelConfig(tp=tp), name="x", world_size=tp, num_layers=4, divisible=named)


def check(teacher: tuple[int, int], student: tuple[int, int], world_size: int) -> None:
    """Grids of plain data parallelism on ranks first-last."""
    there, here = (
        GridLayout(1, 1, last - first + 1, False, (2,), first_rank=first) for first, last in (teacher, student)
    )
    check_ranks(there, here, world_size)


@pytest.mark.parametrize(
    ("teacher", "student", "world_size"),
    [((0, 3), (0, 3), 4), ((0, 1), (2, 3), 4), ((2, 3), (0, 1), 4), ((0, 5), (6, 6), 7)],
)
def test_ranks_that_go_together(teacher: tuple[int, int], student: tuple[int, int], world_size: int) -> None:
    """The same ranks, or disjoint ones, in either order; together they are the world."""
    check(teacher, student, world_size)


@pytest.mark.parametrize(
    ("teacher", "student", "world_size", "says"),
    [
        (
            (0, 3),
            (2, 5),
            6,
            "ranks 0-3 and student.parallel.ranks 2-5 overlap in part; use the same ranks or disjoint ones",
        ),
        ((0, 3), (2, 5), 6, "for example student.parallel.ranks: 4-5"),
        ((0, 5), (0, 3), 6, "overlap in part"),
        ((0, 5), (0, 3), 6, "for example leave both out"),
        ((0, 1), (2, 3), 6, "2 of 6 ranks have no model (the first is 4; teacher on 0-1, student on 2-3); name them"),
        ((1, 3), (1, 3), 4, "1 of 4 ranks have no model (the first is 0"),
        ((0, 1), (3, 3), 4, "1 of 4 ranks have no model (the first is 2"),
    ],
)
def test_ranks_that_do_not(teacher: tuple[int, int], student: tuple[int, int], world_size: int, says: str) -> None:
    """Ranks that overlap in part, and ranks without a model, in one line."""
    with pytest.raises(LayoutError) as caught:
        check(teacher, student, world_size)
    assert says in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
