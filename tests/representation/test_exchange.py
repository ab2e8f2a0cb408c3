"""Executing the plan on gloo ranks: every target row on every rank is the state it claims to be."""

from __future__ import annotations

import contextlib
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.parallel.grid import Grid
from oprd_megatron.representation.exchange import Delivery
from oprd_megatron.representation.rows import block_rows
from oprd_megatron.representation.wire import Wire, WireName
from tests.grids import CODE, Case, Side, grid, random_case
from tests.live_bytes import LiveBytes
from tests.ranks import run_ranks

WIDTH = 4
WORLD = 8
DRAWN = 220
SEED = 2604
CPU = torch.device("cpu")
WIRES: tuple[WireName, ...] = ("fp32", "bf16", "fp8")
RAGGED = [(5, 7), (3, 1), (8, 12), (2, 4), (6, 0), (7, 0), (4, 9), (1, 6)]
LAST_3 = DistillConfig(positions="last_k", k=3, position_anchor="predictor")
CROSSING = DistillConfig(positions="all", layer_map={1: 5, 2: 5, 4: 1})
VPP2 = grid(1, 2, 1, (1, 2, 1, 1), vpp=2)

CASES = {
    "equal tp": Case(RAGGED, grid(2, 1, 1, (5,)), grid(2, 1, 1, (4,)), (2, 2)),
    "equal pp": Case(RAGGED, grid(1, 2, 1, (1, 4)), grid(1, 2, 1, (2, 2)), (2, 2)),
    "equal cp": Case(RAGGED, grid(1, 1, 1, (5,), cp=2), grid(1, 1, 1, (4,), cp=2), (2, 2)),
    "cp to cp sp": Case(RAGGED, grid(1, 1, 1, (5,), cp=4), grid(2, 1, 1, (4,), cp=2, sp=True), (2, 4)),
    "pp to vpp": Case(RAGGED, grid(1, 2, 1, (1, 4)), VPP2, (2, 2)),
    "vpp to cp": Case(RAGGED, VPP2, grid(1, 1, 1, (4,), cp=2), (1, 2), CROSSING),
    "dynamic": Case(RAGGED, grid(2, 2, 1, (1, 4)), grid(2, 1, 2, (4,), sp=True), micro_batch_tokens=20),
    "tp sp to dp": Case(RAGGED, grid(2, 1, 1, (5,), sp=True), grid(1, 1, 2, (4,)), (4, 1)),
    "dp to pp": Case(RAGGED, grid(1, 1, 2, (3,)), grid(1, 2, 1, (1, 4)), (2, 1), LAST_3),
    "disjoint": Case(RAGGED, grid(1, 1, 1, (5,)), grid(1, 1, 1, (4,), at=1), (2, 4), CROSSING),
    "pp to tp sp": Case(RAGGED, grid(1, 2, 1, (4, 1)), grid(2, 1, 1, (4,), sp=True), (1, 2), CROSSING),
    "equal tp pp": Case(RAGGED, grid(2, 2, 1, (4, 1)), grid(2, 2, 1, (2, 2)), (2, 2)),
    "equal tp pp sp": Case(
        RAGGED, grid(2, 2, 1, (1, 4), sp=True), grid(2, 2, 1, (2, 2), sp=True), (2, 2), LAST_3
    ),
    "crossing pairs": Case(RAGGED, grid(2, 2, 1, (1, 4)), grid(2, 2, 1, (3, 1), sp=True), (2, 2), CROSSING),
    "tp dp to pp dp": Case(RAGGED, grid(2, 1, 2, (5,)), grid(1, 2, 2, (1, 3)), (1, 2)),
    "tp8 to pp8": Case(RAGGED, grid(8, 1, 1, (9,), sp=True), grid(1, 8, 1, (1, 2, 1, 1, 1, 1, 1, 1)), (2, 4)),
    "dp8 to tp8": Case(RAGGED, grid(1, 1, 8, (5,)), grid(8, 1, 1, (4,)), (1, 8), LAST_3),
    "disjoint halves": Case(RAGGED, grid(2, 1, 2, (5,), sp=True), grid(1, 2, 2, (2, 2), at=4), (2, 1)),
    "one teacher, seven students": Case(RAGGED, grid(1, 1, 1, (7,)), grid(1, 7, 1, (1,) * 7, at=1), (4, 2)),
    "overlapping": Case(RAGGED, grid(1, 3, 1, (2, 2, 1)), grid(3, 1, 1, (4,), sp=True, at=1), (2, 2)),
    "idle ranks": Case(RAGGED, grid(1, 1, 2, (2,), at=3), grid(1, 3, 1, (2, 1, 1), at=2), (1, 1), LAST_3),
}  # fmt: skip


def drawn(number: int) -> tuple[Case, WireName]:
    """The random cases, the same on every rank: teacher and student on the same ranks, disjoint ones or any."""
    rng = random.Random(f"{SEED} {number}")
    return random_case(rng, WORLD, ("same", "disjoint", "any")), rng.choice(WIRES)


def every_case() -> Iterator[tuple[str, Case, Wire]]:
    for number, (name, case) in enumerate(CASES.items()):
        yield name, case, Wire(WIRES[number % 3], WIDTH)
    for number in range(DRAWN):
        case, wire = drawn(number)
        yield f"drawn({number}) with seed {SEED}: {case}", case, Wire(wire, WIDTH)


def states(layer: int, codes: np.ndarray | list[int], salt: int = 0) -> torch.Tensor:
    """States [n, WIDTH] that say what they are: (layer, sample, position, salt). All are integers below 256, which bf16 holds
    exactly; the salt tells one case from the one before it."""
    sample, position = (torch.as_tensor(values) for values in np.divmod(np.asarray(codes, dtype=np.int64), CODE))
    return torch.stack(
        [torch.full_like(sample, layer), sample, position, torch.full_like(sample, salt)], dim=-1
    ).float()


def teach(side: Side, rank: int, put: Callable[[int, int, torch.Tensor], None], salt: int = 0) -> None:
    """What the teacher's taps do on a rank: show every layer of its stages in every micro-batch, [P_local, 1, D]. No hidden
    state may be alive when `put` has returned: a view of a few rows would keep all of it."""
    if rank not in side.layout.ranks:
        return
    coords = side.layout.coords(rank)
    for layer in side.layout.layers_of(coords.pp):
        for micro_batch in range(side.arrangement.num_micro_batches):
            hidden = states(layer, side.codes(coords, micro_batch), salt).unsqueeze(1)
            gone = weakref.ref(hidden.untyped_storage())
            put(layer, micro_batch, hidden)
            del hidden
            assert gone() is None, f"layer {layer}, micro-batch {micro_batch}: put keeps the hidden state alive"


def check_targets(case: Case, rank: int, delivery: Delivery, wire: Wire, salt: int = 0) -> None:
    """The rank has exactly the targets that its loss needs, row by row in the order of its own rows, and no others."""
    side, needed = case.student, case.needed(rank)
    rows, layers = {}, {pair.teacher_layer for pair in case.pairs}
    if rank in side.layout.ranks:
        rows = block_rows(side.tokens, case.route.order, Grid(side.layout, rank, None), CPU)
    for micro_batch in range(side.arrangement.num_micro_batches):
        for layer in layers:
            found = delivery.rows(micro_batch, layer)
            if (micro_batch, layer) not in needed:
                assert found is None, f"micro-batch {micro_batch}, layer {layer}"
                continue
            codes = side.codes(side.layout.coords(rank), micro_batch)[rows[micro_batch].mine.numpy()]
            assert sorted(codes.tolist()) == needed[micro_batch, layer]
            assert found is not None and found.dtype == wire.dtype
            assert torch.equal(found, wire.encode(states(layer, codes, salt))), f"{micro_batch}, layer {layer}"


@contextlib.contextmanager
def counting_sends() -> Iterator[list[int]]:
    """Bytes of everything that is handed to `isend` in the block."""
    sent: list[int] = []
    original = dist.batch_isend_irecv

    def counted(p2p_op_list: list[dist.P2POp]) -> list[dist.Work]:
        sent.extend(operation.tensor.nbytes for operation in p2p_op_list if operation.op is dist.isend)
        return original(p2p_op_list)

    dist.batch_isend_irecv = counted
    try:
        yield sent
    finally:
        dist.batch_isend_irecv = original


def exchange(case: Case, wire: Wire, salt: int) -> int:
    """One rank, one case: everything that holds of it is asserted. Returns the bytes that left the rank."""
    rank, live = dist.get_rank(), LiveBytes()
    planned = case.route.held_bytes(wire.state_bytes).get(rank, 0)
    leaving = {pair: size for pair, size in case.route.bytes_by_link(wire.state_bytes).items() if pair[0] == rank}
    with live:
        delivery = Delivery(case.route, case.teacher.tokens, rank, wire, CPU)
    assert live.live == delivery.held_bytes == planned
    with live.temporaries_allowed():
        teach(case.teacher, rank, delivery.put, salt)
    assert live.peak == planned
    with counting_sends() as sent:
        delivery.post()
    delivery.wait()
    assert sum(sent) == delivery.sent_bytes == sum(leaving.values())
    assert live.live == delivery.held_bytes == planned - delivery.sent_bytes
    check_targets(case, rank, delivery, wire, salt)
    for micro_batch, layer in case.needed(rank):
        assert delivery.rows(micro_batch, layer) is not None
        delivery.release(micro_batch, layer)
    assert live.live == delivery.held_bytes == 0
    return delivery.sent_bytes


def exchange_all() -> list[int]:
    """One rank: all cases, one after the other in the same world."""
    sent = []
    for number, (name, case, wire) in enumerate(every_case()):
        try:
            sent.append(exchange(case, wire, salt=number % 251))
        except Exception as error:
            raise AssertionError(f"{name}, wire {wire.name}: {error}") from error
    return sent


def test_every_target_row_is_the_right_state() -> None:
    """On hundreds of layouts: each rank ends with exactly the targets its loss needs, holds and sends what the plan says,
    and over all ranks that is the least that can travel."""
    ranks = run_ranks(WORLD, exchange_all, timeout_seconds=300)
    everything = list(every_case())
    least = [sum(map(case.lacking, case.student_layout.ranks)) * wire.state_bytes for _, case, wire in everything]
    assert [sum(sent) for sent in zip(*ranks, strict=True)] == least
    assert len(least) > 200 and sum(bytes_sent > 0 for bytes_sent in least) > 120


def test_the_cases_do_travel() -> None:
    """The written cases are not all local: most move bytes, between several pairs of ranks, and some also keep blocks. The
    drawn ones cover every axis on either side, and ranks that are shared, disjoint, overlapping and idle."""
    links = {name: case.route.bytes_by_link(4) for name, case in CASES.items()}
    assert [name for name, pairs in links.items() if not pairs] == ["equal tp", "equal cp"]
    assert max(len(pairs) for pairs in links.values()) >= 8
    assert sum(any(t.source == t.destination for t in case.transfers) for case in CASES.values()) >= 10
    many = [drawn(number)[0] for number in range(DRAWN)]
    for side in ("teacher_layout", "student_layout"):
        chosen = [getattr(case, side) for case in many]
        for axis in ("tp", "cp", "pp", "dp", "vpp"):
            assert sum(getattr(layout, axis) > 1 for layout in chosen) > 20, f"{side}: {axis}"
        assert sum(layout.sp for layout in chosen) > 20
    assert sum(case.micro_batch_tokens is not None for case in many) > 40
    both = [(set(case.teacher_layout.ranks), set(case.student_layout.ranks)) for case in many]
    assert sum(a == b for a, b in both) > 40
    assert sum(not a & b for a, b in both) > 40
    assert sum(bool(a & b) and a != b for a, b in both) > 20
    assert sum(len(a | b) < WORLD for a, b in both) > 40


@pytest.mark.parametrize("name", CASES)
def test_put_keeps_only_the_planned_rows(name: str) -> None:
    """Of every block, the rows the plan sends from this rank are kept, in the wire's dtype: nothing of layers and
    micro-batches that the plan does not name, and never the hidden state itself (`teach` asserts that it dies)."""
    case, wire = CASES[name], Wire("bf16", WIDTH)
    for rank in range(WORLD):
        live = LiveBytes()
        with live.temporaries_allowed():
            delivery = Delivery(case.route, case.teacher.tokens, rank, wire, CPU)
            teach(case.teacher, rank, delivery.put)
        assert live.live == case.route.held_bytes(wire.state_bytes).get(rank, 0)


def test_put_ignores_what_the_plan_does_not_name() -> None:
    """A layer or micro-batch that nobody needs leaves nothing behind, and what is kept is a copy without a graph."""
    layout, wire = grid(1, 1, 1, (3,)), Wire("fp32", WIDTH)
    case = Case([(2, 2), (3, 0)], layout, layout, config=DistillConfig(positions="all", layer_map={2: 3}))
    delivery = Delivery(case.route, case.teacher.tokens, 0, wire, CPU)
    held = delivery.held_bytes
    delivery.put(1, 0, torch.ones(4, 1, WIDTH))
    delivery.put(3, 1, torch.ones(3, 1, WIDTH))
    hidden = torch.ones(4, 1, WIDTH, requires_grad=True)
    delivery.put(3, 0, hidden * 2)
    with torch.no_grad():
        hidden.zero_()
    kept = delivery.rows(0, 3)
    assert kept is not None and torch.equal(kept, torch.full((2, WIDTH), 2.0)) and not kept.requires_grad
    assert delivery.rows(1, 3) is None and delivery.rows(0, 1) is None
    assert delivery.held_bytes == held == 2 * wire.state_bytes


def test_what_is_local_needs_no_process_group() -> None:
    """One rank has both models: `post` and `wait` touch no process group, and nothing is sent."""
    layout, wire = grid(1, 1, 1, (2,)), Wire("fp32", WIDTH)
    case = Case([(2, 2), (3, 0)], layout, layout)
    delivery = Delivery(case.route, case.teacher.tokens, 0, wire, CPU)
    teach(case.teacher, 0, delivery.put)
    delivery.post()
    delivery.wait()
    assert delivery.sent_bytes == 0 and not dist.is_initialized()
    check_targets(case, 0, delivery, wire)


def test_release_frees_a_stage_s_targets_with_its_last_layer() -> None:
    """Layers of one teacher stage share a block: it is there until the last of them is released, then gone; to release a layer
    twice or one that is not there does nothing."""
    layout, wire = grid(1, 1, 1, (3,)), Wire("bf16", WIDTH)
    case = Case([(1, 2), (1, 4)], layout, layout)
    delivery = Delivery(case.route, case.teacher.tokens, 0, wire, CPU)
    whole = delivery.held_bytes
    assert whole == (2 + 4) * 3 * wire.state_bytes
    for layer in (1, 1, 3, 7):
        delivery.release(0, layer)
    assert delivery.rows(0, 2) is not None and delivery.held_bytes == whole
    delivery.release(0, 2)
    assert delivery.rows(0, 2) is None and delivery.held_bytes == 4 * 3 * wire.state_bytes


def test_states_are_projected_before_they_are_kept() -> None:
    """With a bridge what is kept, counted and sent is the projection, in the wire's format."""
    layout, wire = grid(1, 1, 1, (2,)), Wire("bf16", 2)
    case = Case([(2, 3)], layout, layout)
    matrix = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 2.0]])
    seen: list[tuple[int, Any]] = []

    def project(layer: int, rows: torch.Tensor) -> torch.Tensor:
        seen.append((layer, tuple(rows.shape)))
        return (rows - layer) @ matrix

    delivery = Delivery(case.route, case.teacher.tokens, 0, wire, CPU, project=project)
    teach(case.teacher, 0, delivery.put)
    assert seen == [(1, (3, WIDTH)), (2, (3, WIDTH))]
    for layer in (1, 2):
        expected = ((states(layer, [2, 3, 4]) - layer) @ matrix).bfloat16()
        found = delivery.rows(0, layer)
        assert found is not None and torch.equal(found, expected)
    assert delivery.held_bytes == 3 * 2 * 2 * 2
