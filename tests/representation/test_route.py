"""The routing plan as data: complete, from ranks that hold the states, minimal, and the same for everybody."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings

from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.parallel import GridLayout
from oprd_megatron.parallel.grid import Grid
from oprd_megatron.representation.layer_map import LayerPair
from oprd_megatron.representation.placement import arrange, place_tokens
from oprd_megatron.representation.route import Transfer, moved_tokens, plan_route
from oprd_megatron.representation.rows import block_rows
from tests.grids import Case, cases, grid

CPU = torch.device("cpu")
EXAMPLES = settings(max_examples=250, deadline=None, derandomize=True)
RAGGED = [(5, 7), (3, 1), (8, 12), (2, 4), (6, 0), (7, 0), (4, 9), (1, 6)]
WRITTEN = {
    "tp2 pp2 to sp4": Case(RAGGED, grid(2, 2, 1, (3, 2)), grid(4, 1, 1, (4,), sp=True), (2, 1)),
    "disjoint": Case(RAGGED, grid(2, 1, 2, (6,), sp=True), grid(1, 2, 1, (1, 2), at=4), (1, 4)),
    "crossing": Case(
        RAGGED,
        grid(2, 2, 1, (2, 3)),
        grid(2, 2, 1, (2, 2)),
        (2, 2),
        DistillConfig(positions="all", layer_map={1: 5, 2: 5, 4: 1}),
    ),
    "cp2 to vpp2": Case(RAGGED, grid(2, 1, 1, (6,), cp=2, sp=True), grid(1, 2, 2, (1, 2, 1, 1), vpp=2), (2, 1)),
    "dynamic": Case(RAGGED, grid(1, 2, 1, (2, 2), cp=2), grid(2, 1, 2, (4,), cp=1), micro_batch_tokens=20),
}


def described(transfers: list[Transfer]) -> list[tuple]:
    """Transfers as values that compare."""
    return [(*{**vars(transfer), "tokens": tuple(transfer.tokens.tolist())}.values(),) for transfer in transfers]


def any_case(test: Callable[[Case], None]) -> Callable[[], None]:
    """Run a test on the cases above and on drawn ones."""
    for case in WRITTEN.values():
        test = example(case=case)(test)
    return EXAMPLES(given(case=cases())(test))


def rows_of(case: Case, transfer: Transfer) -> list[tuple[int, int]]:
    """(teacher layer, code) of each row of a block."""
    return [(layer, case.codes[token]) for layer in transfer.teacher_layers for token in transfer.tokens]


@any_case
def test_every_rank_receives_what_it_needs_once(case: Case) -> None:
    """Each student rank gets exactly the (teacher layer, token) of its supervised rows, each once; others none."""
    received: dict[int, Counter] = defaultdict(Counter)
    for transfer in case.transfers:
        received[transfer.destination].update(
            (transfer.student_micro_batch, layer, code) for layer, code in rows_of(case, transfer)
        )
    for rank in {*case.student_layout.ranks, *received}:
        needed = Counter((mb, layer, code) for (mb, layer), codes in case.needed(rank).items() for code in codes)
        assert received[rank] == needed, f"rank {rank}"
        assert not needed or max(needed.values()) == 1


@any_case
def test_supervised_tokens_of_all_student_ranks_are_all_tokens(case: Case) -> None:
    """Over the tensor-, context- and data-parallel ranks of a stage, every layer of the stage is supervised at every token."""
    delivered: Counter = Counter()
    for transfer in case.transfers:
        stage = case.student.layout.coords(transfer.destination).pp
        delivered.update((stage, *row) for row in rows_of(case, transfer))
    layout = case.student.layout
    layers = {(layout.stage_of(pair.student_layer), pair.teacher_layer) for pair in case.pairs}
    assert delivered == Counter({(*layer, code): 1 for layer in layers for code in case.codes})


@any_case
def test_sources_hold_what_they_send(case: Case) -> None:
    """The sending rank computes those layers of those tokens, in the micro-batch and at the local rows named."""
    side = case.teacher
    for transfer in case.transfers:
        assert transfer.num_states == len(transfer.teacher_layers) * len(transfer.tokens) > 0
        coords = side.layout.coords(transfer.source)
        assert set(transfer.teacher_layers) <= set(side.layout.layers_of(coords.pp))
        assert list(transfer.teacher_layers) == sorted(set(transfer.teacher_layers))
        block = side.codes(coords, transfer.teacher_micro_batch)
        sent = block[side.tokens.local_row[transfer.tokens]].tolist()
        assert sent == [case.codes[token] for token in transfer.tokens]


@any_case
def test_blocks_fill_a_rank_s_rows(case: Case) -> None:
    """The blocks that a rank gets of a micro-batch from one teacher stage are contiguous slices that tile its rows, and the
    rows are those that its loss reads (`block_rows`), in its order, which is that of the tokens in `route.order`."""
    slices = defaultdict(list)
    for transfer in case.transfers:
        place = (transfer.destination, transfer.student_micro_batch, transfer.teacher_stage)
        slices[place].append((transfer.first_row, transfer.tokens.tolist()))
    for (rank, micro_batch, _), parts in slices.items():
        coords = case.student_layout.coords(rank)
        rows = block_rows(case.student.tokens, case.route.order, Grid(case.student_layout, rank, None), CPU)
        local = case.student.codes(coords, micro_batch)[rows[micro_batch].mine.numpy()].tolist()
        filled: list[int] = []
        for first_row, tokens in sorted(parts):
            assert first_row == len(filled)
            filled += tokens
        assert local == [case.codes[token] for token in filled]


@any_case
def test_bytes_are_the_minimum(case: Case) -> None:
    """What travels is what a destination needs and does not compute itself, each state once; the rest costs nothing."""
    state_bytes = 24
    lacking = {rank: case.lacking(rank) for rank in case.student_layout.ranks}
    links = case.route.bytes_by_link(state_bytes)
    arriving: Counter[int] = Counter()
    for (source, destination), size in links.items():
        assert source != destination and size > 0
        arriving[destination] += size
    assert arriving == Counter({rank: states * state_bytes for rank, states in lacking.items()})
    assert case.route.total_bytes(state_bytes) == sum(lacking.values()) * state_bytes


@any_case
def test_held_bytes_are_what_ranks_send_and_need(case: Case) -> None:
    """What a rank's own loss needs is counted once, wherever it comes from; what it sends is counted besides."""
    state_bytes = 10
    held: Counter[int] = Counter()
    for rank in case.student_layout.ranks:
        held[rank] += sum(len(codes) for codes in case.needed(rank).values()) * state_bytes
    for (source, _), size in case.route.bytes_by_link(state_bytes).items():
        held[source] += size
    assert case.route.held_bytes(state_bytes) == {rank: size for rank, size in held.items() if size}


@any_case
def test_a_rank_s_transfers_are_its_part_of_the_plan(case: Case) -> None:
    """`transfers(rank)` is the whole list's part that touches the rank, in the same order; `num_states` counts alike."""
    for rank in {*case.teacher_layout.ranks, *case.student_layout.ranks, 99}:
        mine = [t for t in case.transfers if rank in (t.source, t.destination)]
        assert described(case.route.transfers(rank)) == described(mine)
    assert case.route.num_states.tolist() == [transfer.num_states for transfer in case.transfers]


@any_case
def test_moved_tokens_are_those_of_a_plan_with_one_pair(case: Case) -> None:
    """[a, b] is what a plan for one pair between these two stages would move."""
    teacher, student = case.teacher, case.student
    moved = moved_tokens(teacher.layout, teacher.tokens, student.layout, student.tokens)
    for a in range(teacher.layout.pp):
        for b in range(student.layout.pp):
            pair = LayerPair(student.layout.layers_of(b)[0], teacher.layout.layers_of(a)[-1])
            route = plan_route([pair], teacher.layout, teacher.tokens, student.layout, student.tokens)
            assert moved[a, b] == route.total_bytes(1)


@any_case
def test_plan_is_deterministic_and_ordered(case: Case) -> None:
    """Planned again from scratch the list is the same, block for block; between two ranks no two blocks are alike, so
    the list's order is one order of messages on both ends."""
    again = replace(case)
    assert described(again.transfers) == described(case.transfers)
    blocks = [
        (t.source, t.destination, t.teacher_layers, t.teacher_micro_batch, t.student_micro_batch)
        for t in case.transfers
        if t.source != t.destination
    ]
    assert len(set(blocks)) == len(blocks)


@any_case
def test_order_of_pairs_does_not_matter(case: Case) -> None:
    """The plan depends on the set of pairs only: ranks that list them differently still agree."""
    teacher, student = case.teacher, case.student
    reverse = plan_route(case.pairs[::-1], teacher.layout, teacher.tokens, student.layout, student.tokens)
    assert described(reverse.transfers()) == described(case.transfers)


@pytest.mark.parametrize("sp", [False, True])
@pytest.mark.parametrize(
    ("tp", "cp", "pp", "dp"), [(1, 1, 1, 1), (2, 1, 1, 1), (2, 1, 1, 2), (1, 1, 1, 4), (2, 2, 1, 1), (1, 2, 1, 2)]
)
def test_equal_grids_of_one_stage_move_nothing(tp: int, cp: int, pp: int, dp: int, sp: bool) -> None:
    """Teacher and student on the same ranks in the same way: all blocks are local and no byte travels."""
    layout = grid(tp, pp, dp, (4,), sp=sp and tp > 1, cp=cp)
    case = Case(RAGGED, layout, layout, (2, 2))
    assert case.transfers and case.route.bytes_by_link(8) == {}
    assert all(transfer.source == transfer.destination for transfer in case.transfers)


@pytest.mark.parametrize("layout", [grid(1, 2, 1, (2, 2)), grid(1, 2, 1, (1, 2, 1, 1), vpp=2)], ids=["pp2", "pp2 vpp2"])
def test_equal_stages_move_nothing_where_layers_stay(layout: GridLayout) -> None:
    """Pipelines of equal depth and stages align layer l with layer l on the same rank."""
    assert Case(RAGGED, layout, layout).route.total_bytes(8) == 0


def test_written_out() -> None:
    """One teacher rank, two student stages of 1 layer, 2 + 1 supervised tokens: the second stage's layer travels."""
    case = Case([(1, 2), (2, 1)], grid(1, 1, 1, (3,)), grid(1, 2, 1, (1, 1)))
    found = [
        (t.source, t.destination, t.teacher_layers, t.student_micro_batch, t.tokens.tolist()) for t in case.transfers
    ]
    assert found == [
        (0, 0, (1,), 0, [0, 1]),
        (0, 0, (1,), 1, [2]),
        (0, 1, (3,), 0, [0, 1]),
        (0, 1, (3,), 1, [2]),
    ]
    assert case.route.bytes_by_link(10 * 2) == {(0, 1): 3 * 10 * 2}
    assert case.route.held_bytes(10 * 2) == {0: 3 * 10 * 2 + 3 * 10 * 2, 1: 3 * 10 * 2}


def test_layers_of_one_stage_travel_together_and_once() -> None:
    """Teacher layers 2 and 3 for three student layers of one stage: one block of two layers, not three of one."""
    config = DistillConfig(layer_map={1: 2, 2: 2, 3: 3})
    (transfer,) = Case([(1, 2)], grid(1, 1, 1, (3,)), grid(1, 1, 1, (3,), at=1), config=config).transfers
    assert transfer.teacher_layers == (2, 3) and transfer.num_states == 4


def test_no_supervised_tokens_is_an_empty_plan() -> None:
    """Nothing to align, nothing to send."""
    layout = grid(2, 1, 1, (2,))
    case = Case([(3, 0), (2, 0)], layout, layout)
    assert case.transfers == [] and case.route.held_bytes(8) == {} and case.route.bytes_by_link(8) == {}


def test_a_thousand_ranks_are_planned_in_seconds() -> None:
    """1024 ranks (tp 8 x cp 2 x pp 8 x dp 8 for the teacher, another split for the student), 2,000 rollouts of up to 2,000
    tokens, 48 layers: a plan takes seconds, as the docstring says."""
    teacher, student = grid(8, 8, 8, (10,) * 8, sp=True, cp=2), grid(4, 4, 64, (12,) * 4, sp=True)
    rng = np.random.default_rng(0)
    lengths = rng.integers(200, 2000, size=2048).tolist()
    positions = [range(100, length) for length in lengths]
    pairs = [LayerPair(layer, layer + 20) for layer in range(1, 49)]
    started = time.process_time()
    sides = [place_tokens(positions, arrange(lengths, layout, 4), layout) for layout in (teacher, student)]
    route = plan_route(pairs, teacher, sides[0], student, sides[1])
    total = route.total_bytes(2)
    assert time.process_time() - started < 30
    assert total <= 48 * sum(map(len, positions)) * 2
