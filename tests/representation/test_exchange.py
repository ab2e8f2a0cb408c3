"""Executing the plan on gloo ranks: every target row on every rank is the state it claims to be."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.distributed as dist

from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.parallel import GridLayout
from oprd_megatron.representation.exchange import Outbox, exchange
from oprd_megatron.representation.route import planned_bytes
from tests.grids import CODE, Case
from tests.ranks import run_ranks

WIDTH = 4
RAGGED = [(5, 7), (3, 1), (8, 12), (2, 4), (6, 0), (7, 0), (4, 9), (1, 6)]
LAST_3 = DistillConfig(positions="last_k", k=3, position_anchor="predictor")
CROSSING = DistillConfig(positions="all", layer_map={1: 5, 2: 5, 4: 1})


def grid(tp: int, pp: int, dp: int, layers: tuple[int, ...], *, sp: bool = False, at: int = 0) -> GridLayout:
    return GridLayout(tp, pp, dp, sp, layers, first_rank=at)


CASES = {
    # name: (world size, case)
    "2: equal tp": (2, Case(RAGGED, grid(2, 1, 1, (5,)), grid(2, 1, 1, (4,)), (2, 2))),
    "2: equal pp": (2, Case(RAGGED, grid(1, 2, 1, (1, 4)), grid(1, 2, 1, (2, 2)), (2, 2))),
    "2: tp sp to dp": (2, Case(RAGGED, grid(2, 1, 1, (5,), sp=True), grid(1, 1, 2, (4,)), (4, 1))),
    "2: dp to pp": (2, Case(RAGGED, grid(1, 1, 2, (3,)), grid(1, 2, 1, (1, 4)), (2, 1), LAST_3)),
    "2: disjoint": (2, Case(RAGGED, grid(1, 1, 1, (5,)), grid(1, 1, 1, (4,), at=1), (2, 4), CROSSING)),
    "2: pp to tp sp": (2, Case(RAGGED, grid(1, 2, 1, (4, 1)), grid(2, 1, 1, (4,), sp=True), (1, 2), CROSSING)),
    "4: equal tp pp": (4, Case(RAGGED, grid(2, 2, 1, (4, 1)), grid(2, 2, 1, (2, 2)), (2, 2))),
    "4: equal tp pp sp": (
        4,
        Case(RAGGED, grid(2, 2, 1, (1, 4), sp=True), grid(2, 2, 1, (2, 2), sp=True), (2, 2), LAST_3),
    ),
    "4: crossing pairs": (4, Case(RAGGED, grid(2, 2, 1, (1, 4)), grid(2, 2, 1, (3, 1), sp=True), (2, 2), CROSSING)),
    "4: tp dp to pp dp": (4, Case(RAGGED, grid(2, 1, 2, (5,)), grid(1, 2, 2, (1, 3)), (1, 2))),
    "4: tp4 to pp4": (4, Case(RAGGED, grid(4, 1, 1, (6,), sp=True), grid(1, 4, 1, (1, 2, 1, 1)), (2, 4))),
    "4: dp4 to tp4": (4, Case(RAGGED, grid(1, 1, 4, (5,)), grid(4, 1, 1, (4,)), (1, 8), LAST_3)),
    "4: disjoint halves": (4, Case(RAGGED, grid(2, 1, 1, (5,), sp=True), grid(1, 2, 1, (2, 2), at=2), (2, 1))),
    "4: one teacher, three students": (4, Case(RAGGED, grid(1, 1, 1, (7,)), grid(1, 3, 1, (1, 1, 1), at=1), (4, 2))),
    "4: overlapping": (4, Case(RAGGED, grid(1, 3, 1, (2, 2, 1)), grid(3, 1, 1, (4,), sp=True, at=1), (2, 2))),
    "4: idle rank": (4, Case(RAGGED, grid(1, 1, 2, (2,)), grid(1, 3, 1, (2, 1, 1)), (1, 1), LAST_3)),
}


def encode(layer: int, codes: np.ndarray | list[int], dtype: torch.dtype) -> torch.Tensor:
    """States [.., WIDTH] that say what they are: (layer, sample, position, layer * sample - position). All are integers
    below 256, which bf16 holds exactly."""
    sample, position = (torch.as_tensor(values) for values in np.divmod(np.asarray(codes, dtype=np.int64), CODE))
    return torch.stack([torch.full_like(sample, layer), sample, position, layer * sample - position], dim=-1).to(dtype)


def fill(case: Case, rank: int, wire: torch.dtype) -> Outbox:
    """What the teacher's taps do on this rank: show every layer of its stage in every micro-batch."""
    outbox = Outbox(case.transfers, case.teacher.tokens, rank, width=WIDTH, dtype=wire, device=torch.device("cpu"))
    if rank in case.teacher.ranks():
        coords = case.teacher.layout.coords(rank)
        for micro_batch in range(case.teacher.arrangement.num_micro_batches):
            codes = case.teacher.codes(coords.dp, micro_batch, coords.tp)
            for layer in case.teacher.layout.layers_of(coords.pp):
                outbox.put(layer, micro_batch, encode(layer, codes, torch.float32))
    return outbox


def exchanged(case: Case, wire: torch.dtype) -> dict:
    """One rank: exchange twice (a second batch must find nothing left over from the first)."""
    for _ in range(2):
        outbox = fill(case, dist.get_rank(), wire)
        targets, sent = exchange(outbox, case.student.tokens)
    return {"states": targets.states, "sent": sent, "left": len(outbox._states)}


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_every_target_row_is_the_right_state(name: str, wire: torch.dtype) -> None:
    """Each rank ends with exactly the targets its loss needs, row by row in the order of its own rows; the bytes that
    the ranks sent are those planned, and the outbox is empty."""
    world, case = CASES[name]
    ranks = run_ranks(world, exchanged, case, wire)
    sent: dict[int, int] = defaultdict(int)
    for (source, _), size in planned_bytes(case.transfers, WIDTH, wire.itemsize).items():
        sent[source] += size
    assert any(case.needed(rank) for rank in range(world))
    for rank, found in enumerate(ranks):
        needed = case.needed(rank)
        assert found["states"].keys() == needed.keys(), f"rank {rank}"
        for (micro_batch, layer), codes in needed.items():
            expected = encode(layer, codes, wire)
            states = found["states"][micro_batch, layer]
            assert states.dtype == wire
            assert torch.equal(states, expected), f"rank {rank}, micro-batch {micro_batch}, layer {layer}"
        assert found["sent"] == sent[rank], f"rank {rank}"
        assert found["left"] == 0


def test_the_cases_do_travel() -> None:
    """The cases above are not all local: most move bytes, between several pairs of ranks, and some also keep blocks."""
    moved = {name: planned_bytes(case.transfers, WIDTH, 4) for name, (_, case) in CASES.items()}
    assert [name for name, pairs in moved.items() if not pairs] == ["2: equal tp"]
    assert max(len(pairs) for pairs in moved.values()) >= 6
    local = [name for name, (_, case) in CASES.items() if any(t.source == t.destination for t in case.transfers)]
    assert len(local) >= 10


@pytest.mark.parametrize("name", CASES)
def test_put_keeps_only_the_planned_rows(name: str) -> None:
    """Of every block, the rows the plan sends from this rank are kept, in the wire dtype, as copies: never a view that
    would keep the whole hidden state alive, and nothing of layers and micro-batches that the plan does not name."""
    world, case = CASES[name]
    for rank in range(world):
        outbox = fill(case, rank, torch.bfloat16)
        mine = [number for number, transfer in enumerate(case.transfers) if transfer.source == rank]
        kept = sum(tensor.untyped_storage().nbytes() for tensor in outbox._states.values())
        assert kept == sum(case.transfers[number].num_rows for number in mine) * WIDTH * 2
        for number in mine:
            transfer = case.transfers[number]
            codes = [case.codes[token] for token in transfer.tokens]
            expected = torch.cat([encode(layer, codes, torch.bfloat16) for layer in transfer.teacher_layers])
            assert torch.equal(outbox.take(number), expected)
        assert not outbox._states


def test_put_ignores_what_the_plan_does_not_name() -> None:
    """A layer or micro-batch that nobody needs leaves nothing behind."""
    layout = grid(1, 1, 1, (3,))
    config = DistillConfig(positions="all", layer_map={2: 3})
    case = Case([(2, 2), (3, 0)], layout, layout, config=config)
    outbox = Outbox(
        case.transfers, case.teacher.tokens, 0, width=WIDTH, dtype=torch.float32, device=torch.device("cpu")
    )
    outbox.put(1, 0, torch.ones(4, 1, WIDTH))
    outbox.put(3, 1, torch.ones(3, 1, WIDTH))
    assert not outbox._states
    hidden = torch.ones(4, 1, WIDTH, requires_grad=True)
    outbox.put(3, 0, hidden * 2)
    with torch.no_grad():
        hidden.zero_()
    (kept,) = outbox._states.values()
    assert torch.equal(kept, torch.full((2, WIDTH), 2.0)) and not kept.requires_grad


def test_a_rank_without_supervised_tokens_has_no_targets() -> None:
    """`rows` says None for a micro-batch that supervises nothing here, and the rows where it does. No process group is
    touched when everything is local."""
    layout = grid(1, 1, 1, (2,))
    case = Case([(2, 2), (3, 0)], layout, layout)
    targets, sent = exchange(fill(case, 0, torch.float32), case.student.tokens)
    assert sent == 0 and targets.rows(1, 1) is None
    assert torch.equal(targets.rows(0, 2), encode(2, [2, 3], torch.float32))
