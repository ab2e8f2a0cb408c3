"""The routing plan as data: complete, from ranks that hold the states, minimal, and the same for everybody."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import example, given, settings

from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.parallel import GridLayout
from oprd_megatron.representation.route import Transfer, plan_route, planned_bytes
from tests.grids import Case, cases

EXAMPLES = settings(max_examples=250, deadline=None, derandomize=True)
RAGGED = [(5, 7), (3, 1), (8, 12), (2, 4), (6, 0), (7, 0), (4, 9), (1, 6)]
TP2_PP2_TO_SP4 = Case(RAGGED, GridLayout(2, 2, 1, False, (3, 2)), GridLayout(4, 1, 1, True, (4,)), (2, 1))
DISJOINT = Case(RAGGED, GridLayout(2, 1, 2, True, (6,)), GridLayout(1, 2, 1, False, (1, 2), first_rank=4), (1, 4))
CROSSING = Case(
    RAGGED,
    GridLayout(2, 2, 1, False, (2, 3)),
    GridLayout(2, 2, 1, False, (2, 2)),
    (2, 2),
    DistillConfig(positions="all", layer_map={1: 5, 2: 5, 4: 1}),
)


def rows_of(case: Case, transfer: Transfer) -> list[tuple[int, int]]:
    """(teacher layer, code) of each row of a block."""
    return [(layer, case.codes[token]) for layer in transfer.teacher_layers for token in transfer.tokens]


@EXAMPLES
@given(case=cases())
@example(case=TP2_PP2_TO_SP4)
@example(case=DISJOINT)
@example(case=CROSSING)
def test_every_rank_receives_what_it_needs_once(case: Case) -> None:
    """Each student rank gets exactly the (teacher layer, token) of its supervised rows, each once; others none."""
    received: dict[int, Counter] = defaultdict(Counter)
    for transfer in case.transfers:
        received[transfer.destination].update(
            (transfer.student_micro_batch, layer, code) for layer, code in rows_of(case, transfer)
        )
    for rank in {*case.student.ranks(), *received}:
        needed = Counter((mb, layer, code) for (mb, layer), codes in case.needed(rank).items() for code in codes)
        assert received[rank] == needed, f"rank {rank}"
        assert not needed or max(needed.values()) == 1


@EXAMPLES
@given(case=cases())
@example(case=TP2_PP2_TO_SP4)
@example(case=DISJOINT)
def test_supervised_tokens_of_all_student_ranks_are_all_tokens(case: Case) -> None:
    """Over the tensor- and data-parallel ranks of a stage, every layer of the stage is supervised at every token."""
    delivered: Counter = Counter()
    for transfer in case.transfers:
        stage = case.student.layout.coords(transfer.destination).pp
        delivered.update((stage, *row) for row in rows_of(case, transfer))
    layout = case.student.layout
    layers = {(layout.stage_of(pair.student_layer), pair.teacher_layer) for pair in case.pairs}
    assert delivered == Counter({(*layer, code): 1 for layer in layers for code in case.codes})


@EXAMPLES
@given(case=cases())
@example(case=TP2_PP2_TO_SP4)
@example(case=DISJOINT)
@example(case=CROSSING)
def test_sources_hold_what_they_send(case: Case) -> None:
    """The sending rank computes those layers of those tokens, in the micro-batch and at the local rows named."""
    side = case.teacher
    for transfer in case.transfers:
        assert transfer.num_rows == len(transfer.teacher_layers) * len(transfer.tokens) > 0
        coords = side.layout.coords(transfer.source)
        assert set(transfer.teacher_layers) <= set(side.layout.layers_of(coords.pp))
        assert list(transfer.teacher_layers) == sorted(set(transfer.teacher_layers))
        block = side.codes(coords.dp, transfer.teacher_micro_batch, coords.tp).flatten()
        sent = block[side.tokens.local_row[transfer.tokens]].tolist()
        assert sent == [case.codes[token] for token in transfer.tokens]


@EXAMPLES
@given(case=cases())
@example(case=TP2_PP2_TO_SP4)
@example(case=DISJOINT)
def test_rows_ascend_as_the_student_lays_them_out(case: Case) -> None:
    """Within a block, tokens ascend by the student's row: what arrives is in the order of the loss."""
    for transfer in case.transfers:
        assert (np.diff(case.student.tokens.row[transfer.tokens]) > 0).all()


@EXAMPLES
@given(case=cases())
@example(case=TP2_PP2_TO_SP4)
@example(case=DISJOINT)
@example(case=CROSSING)
def test_bytes_are_the_minimum(case: Case) -> None:
    """What travels is what a destination needs and does not compute itself, each state once; the rest costs nothing."""
    width, itemsize = 12, 2
    lacking = 0
    for rank in case.student.ranks():
        for (_, layer), codes in case.needed(rank).items():
            here = case.held(rank, layer)
            lacking += sum(code not in here for code in codes)
    planned = planned_bytes(case.transfers, width, itemsize)
    assert sum(planned.values()) == lacking * width * itemsize
    assert all(source != destination for source, destination in planned)


@EXAMPLES
@given(case=cases())
def test_plan_is_deterministic_and_ordered(case: Case) -> None:
    """Planned again from scratch the list is the same, block for block; between two ranks no two blocks are alike, so
    the list's order is one order of messages on both ends."""
    again = Case(case.lengths, case.teacher_layout, case.student_layout, case.micro_batch_sizes, case.config).transfers
    described = [
        [(t.source, t.destination, t.teacher_layers, t.teacher_micro_batch, t.student_micro_batch, t.tokens.tolist())
         for t in transfers]
        for transfers in (case.transfers, again)
    ]  # fmt: skip
    assert described[0] == described[1]
    blocks = [block[:5] for block in described[0]]
    assert len(set(blocks)) == len(blocks)


@EXAMPLES
@given(case=cases())
def test_order_of_pairs_does_not_matter(case: Case) -> None:
    """The plan depends on the set of pairs only: ranks that list them differently still agree."""
    teacher, student = case.teacher, case.student
    reverse = plan_route(case.pairs[::-1], teacher.layout, teacher.tokens, student.layout, student.tokens)
    for one, other in zip(case.transfers, reverse, strict=True):
        assert (one.source, one.destination, one.teacher_layers) == (
            other.source,
            other.destination,
            other.teacher_layers,
        )
        assert np.array_equal(one.tokens, other.tokens)


@pytest.mark.parametrize("sp", [False, True])
@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 1, 1), (2, 1, 1), (2, 1, 2), (1, 1, 4)])
def test_equal_grids_of_one_stage_move_nothing(tp: int, pp: int, dp: int, sp: bool) -> None:
    """Teacher and student on the same ranks in the same way: all blocks are local and no byte travels."""
    layout = GridLayout(tp, pp, dp, sp and tp > 1, (4,))
    case = Case(RAGGED, layout, layout, (2, 2))
    assert case.transfers and planned_bytes(case.transfers, 8, 4) == {}
    assert all(transfer.source == transfer.destination for transfer in case.transfers)


def test_equal_stages_move_nothing_where_layers_stay() -> None:
    """Pipelines of equal depth and stages align layer l with layer l on the same rank."""
    layout = GridLayout(1, 2, 1, False, (2, 2))
    assert planned_bytes(Case(RAGGED, layout, layout).transfers, 8, 4) == {}


def test_written_out() -> None:
    """One teacher rank, two student stages of 1 layer, 2 + 1 supervised tokens: the second stage's layer travels."""
    case = Case([(1, 2), (2, 1)], GridLayout(1, 1, 1, False, (3,)), GridLayout(1, 2, 1, False, (1, 1)))
    found = [
        (t.source, t.destination, t.teacher_layers, t.student_micro_batch, t.tokens.tolist()) for t in case.transfers
    ]
    assert found == [
        (0, 0, (1,), 0, [0, 1]),
        (0, 0, (1,), 1, [2]),
        (0, 1, (3,), 0, [0, 1]),
        (0, 1, (3,), 1, [2]),
    ]
    assert planned_bytes(case.transfers, width=10, itemsize=2) == {(0, 1): 3 * 10 * 2}


def test_layers_of_one_stage_travel_together_and_once() -> None:
    """Teacher layers 2 and 3 for three student layers of one stage: one block of two layers, not three of one."""
    pairs = {1: 2, 2: 2, 3: 3}
    case = Case(
        [(1, 2)],
        GridLayout(1, 1, 1, False, (3,)),
        GridLayout(1, 1, 1, False, (3,), first_rank=1),
        config=DistillConfig(layer_map=pairs),
    )
    (transfer,) = case.transfers
    assert transfer.teacher_layers == (2, 3) and transfer.num_rows == 4


def test_no_supervised_tokens_is_an_empty_plan() -> None:
    """Nothing to align, nothing to send."""
    layout = GridLayout(2, 1, 1, False, (2,))
    assert Case([(3, 0), (2, 0)], layout, layout).transfers == []
