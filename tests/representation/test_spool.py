"""Bounded memory: what ranks hold of a batch's teacher states, measured from outside, and who waits for whom."""

from __future__ import annotations

import math
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pydantic import ByteSize

from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.errors import ConfigError
from oprd_megatron.platform import Platform
from oprd_megatron.representation.batch import BatchPlan
from oprd_megatron.representation.spool import Spool
from oprd_megatron.representation.wire import Wire
from tests.gpu import needs_gpu
from tests.grids import Case, grid, random_case
from tests.live_bytes import LiveBytes
from tests.ranks import run_ranks
from tests.representation.test_exchange import WIDTH, check_targets, teach

WORLD = 6
DRAWN = 60
SEED = 2605
PLATFORM = Platform(torch.device("cpu"), "gloo")
OUTPUT = Wire("fp32", WIDTH)
"""Of the teacher's outputs."""


def drawn(number: int) -> tuple[Case, int | None, Wire, bool]:
    """(case, budget, wire, train): both models on the same or on disjoint ranks; the budget is the least that works, anything
    between that and a whole batch, or none. In every other case the teacher's outputs travel too."""
    rng = random.Random(f"{SEED} {number}")
    case = random_case(rng, WORLD, ("same", "disjoint"))
    size, wire = rng.randint(1, 2), Wire(rng.choice(["fp32", "bf16", "fp8"]), WIDTH)
    case = replace(case, micro_batch_sizes=(size, size), output_bytes=OUTPUT.state_bytes if number % 2 else 0)
    count = math.lcm(case.teacher_layout.dp, case.student_layout.dp) * size * rng.randint(2, 8)
    case = replace(case, lengths=[(rng.randint(0, 5), rng.randint(number > 5, 6)) for _ in range(count)])
    least, whole = least_budget(case, wire), max(case.held_bytes(wire.state_bytes).values())
    budget = rng.choice([least, rng.randint(least, max(least, whole)), rng.randint(least, max(least, whole)), None])
    return case, budget, wire, rng.random() < 0.5


def least_budget(case: Case, wire: Wire) -> int:
    """The number that the planner names to a budget of one byte."""
    with pytest.raises(ConfigError) as caught:
        case.planner(wire.state_bytes, spool_bytes=1).plan(case.samples)
    return int(str(caught.value).split()[-1])


def planned(case: Case, budget: int | None, wire: Wire) -> tuple[BatchPlan, list[Case]]:
    """The plan of a case, and each chunk of it as a case of its own."""
    plan = case.planner(wire.state_bytes, spool_bytes=budget).plan(case.samples)
    parts = [
        replace(case, lengths=[(len(sample.prompt_ids), len(sample.response_ids)) for sample in chunk.samples])
        for chunk in plan.chunks
    ]
    return plan, parts


def expected_peak(sizes: list[int], budget: int | None, teaches: bool, learns: bool) -> int:
    """Most bytes that a rank holds: one chunk at a time with both models; as many as fit, in order, with one of them."""
    if teaches and learns:
        return max(sizes)
    peak, first, stop = 0, 0, 0
    for number in range(len(sizes)):
        if learns:  # what comes before was used; what follows is awaited as far as it fits
            first, stop = number, max(stop, number + 1)
            while stop < len(sizes) and (budget is None or sum(sizes[first : stop + 1]) <= budget):
                stop += 1
        else:  # what was sent is kept until this one needs its room
            stop = number + 1
            while first < number and budget is not None and sum(sizes[first:stop]) > budget:
                first += 1
        peak = max(peak, sum(sizes[first:stop]))
    return peak


def new_spool(case: Case, plan: BatchPlan, budget: int | None, wire: Wire) -> Spool:
    rank = dist.get_rank()
    teaches, learns = rank in case.teacher_layout.ranks, rank in case.student_layout.ranks
    return Spool(
        plan,
        rank,
        wire,
        DistillConfig(spool_bytes=None if budget is None else ByteSize(budget)),
        PLATFORM,
        teaches=teaches,
        learns=learns,
        output_wire=OUTPUT if case.output_bytes else None,
    )


def take_batch_through(case: Case, budget: int | None, wire: Wire, train: bool, salt: int) -> tuple[int, int]:
    """One rank: a batch chunk by chunk, as `Alignment.run` does it. Returns (bytes sent, most bytes held)."""
    rank, live = dist.get_rank(), LiveBytes()
    plan, parts = planned(case, budget, wire)
    spool = new_spool(case, plan, budget, wire)
    for number, part in enumerate(parts):
        with live:
            delivery = spool.open(number)
        freight = [(part, delivery, wire)]
        outputs = spool.outputs(number)
        assert (outputs is not None) == bool(case.output_bytes)
        if outputs is not None:
            freight.append((part.outputs, outputs, OUTPUT))
        if spool.teaches:
            with live.temporaries_allowed():
                for what, into, _ in freight:
                    teach(what.teacher, rank, into.put, salt + number)
        with live:
            spool.exchange(number)
        assert live.live == spool.held_bytes
        if spool.learns:
            for what, found, how in freight:
                check_targets(what, rank, found, how, salt + number)
                for micro_batch, layer in what.needed(rank) if train else ():
                    found.release(micro_batch, layer)
            spool.close(number)
        assert live.live == spool.held_bytes
    spool.finish()
    sizes = [part.held_bytes(wire.state_bytes).get(rank, 0) for part in parts]
    peak = expected_peak(sizes, budget, spool.teaches, spool.learns)
    assert (live.peak, spool.peak_bytes) == (peak, peak), f"{sizes}"
    assert budget is None or peak <= budget
    assert live.live == spool.held_bytes == 0  # also what no one released, with the deliveries still at hand
    return spool.sent_bytes, peak


def take_all_through() -> list[tuple[int, int]]:
    found = []
    for number in range(DRAWN):
        case, budget, wire, train = drawn(number)
        try:
            found.append(take_batch_through(case, budget, wire, train, 4 * number % 200))
        except Exception as error:
            raise AssertionError(f"drawn({number}) with seed {SEED}, budget {budget}, {case}: {error}") from error
    return found


def test_memory_stays_under_the_budget() -> None:
    """Over many layouts, on shared and on disjoint ranks, with budgets from the least on: no rank ever has more bytes of states
    and outputs alive than `spool_bytes`, the most is what follows from the plan, and it is what the spool reports; what was
    sent or released is freed; every target is right; and chunks together send what the plan of each says."""
    ranks = run_ranks(WORLD, take_all_through, timeout_seconds=300)
    several = bounded = 0
    for number, found in enumerate(zip(*ranks, strict=True)):
        case, budget, wire, _ = drawn(number)
        plan, parts = planned(case, budget, wire)
        sent, peaks = zip(*found, strict=True)
        both = [(part, wire.state_bytes) for part in parts] + [(part.outputs, case.output_bytes) for part in parts]
        least = sum(part.lacking(rank) * size for part, size in both for rank in case.student_layout.ranks)
        assert sum(sent) == least
        several += len(plan.chunks) > 1
        bounded += budget is not None and max(peaks) < max(case.held_bytes(wire.state_bytes).values())
    assert several > 30 and bounded > 20


EQUAL = [(1, 3)] * 8
APART = Case(EQUAL, grid(1, 1, 1, (2,)), grid(1, 1, 1, (2,), at=1))
STATE = Wire("bf16", WIDTH)
CHUNK_BYTES = 3 * 2 * STATE.state_bytes
"""Of each of the eight chunks of APART: one sample, three tokens, two layers."""


def until(path: Path) -> None:
    """Wait for the other rank to have got somewhere."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} never happened"
        time.sleep(0.002)


def paced(budget: int | None, folder: Path, waits: list[int]) -> list[tuple[float, int]]:
    """Rank 0 teaches as fast as it may and says in `folder` which chunk it has opened; rank 1 begins to receive chunk n only
    once rank 0 has opened chunk waits[n]. Returns, for every chunk, (when it was opened or received, bytes held then)."""
    plan, parts = planned(APART, budget, STATE)
    spool, found = new_spool(APART, plan, budget, STATE), []
    for number, part in enumerate(parts):
        delivery = spool.open(number)
        if spool.teaches:
            found.append((time.monotonic(), spool.held_bytes))
            (folder / f"{number}").touch()
            teach(part.teacher, 0, delivery.put, number)
            spool.exchange(number)
        else:
            until(folder / f"{waits[number]}")
            now = time.monotonic()
            spool.exchange(number)
            found.append((now, spool.held_bytes))
            check_targets(part, 1, delivery, STATE, number)
            spool.close(number)
    spool.finish()
    return found


def test_a_teacher_waits_for_room(tmp_path: Path) -> None:
    """With room for two chunks the teacher opens chunks 0 and 1 while the student has received nothing, and never chunk n + 3
    before the student asks for chunk n + 1; the student receives one chunk ahead of the one it works on."""
    last = len(EQUAL) - 1
    waits = [1, *(min(number + 2, last) for number in range(1, len(EQUAL)))]
    teacher, student = run_ranks(2, paced, 2 * CHUNK_BYTES, tmp_path, waits)
    assert len(teacher) == len(student) == len(EQUAL)
    assert teacher[2][0] > student[0][0]
    for number in range(1, last - 2):
        assert teacher[number + 3][0] > student[number][0], f"chunk {number}"
    assert [held for _, held in teacher] == [CHUNK_BYTES] + [2 * CHUNK_BYTES] * last
    assert [held for _, held in student] == [2 * CHUNK_BYTES] * last + [CHUNK_BYTES]


def test_without_a_budget_nobody_waits(tmp_path: Path) -> None:
    """The teacher opens and sends every chunk before the student has received any; the student makes room for all at once."""
    teacher, student = run_ranks(2, paced, None, tmp_path, [len(EQUAL) - 1] * len(EQUAL))
    assert len(teacher) == len(EQUAL)
    assert [held for _, held in teacher] == [CHUNK_BYTES * (n + 1) for n in range(len(EQUAL))]
    assert [held for _, held in student] == [CHUNK_BYTES * (len(EQUAL) - n) for n in range(len(EQUAL))]


def test_a_budget_of_one_chunk_goes_back_and_forth(tmp_path: Path) -> None:
    """The least budget: the teacher opens chunk n + 1 only once the student asks for chunk n, and no one holds two."""
    teacher, student = run_ranks(2, paced, CHUNK_BYTES, tmp_path, list(range(len(EQUAL))))
    for number in range(len(EQUAL) - 1):
        assert teacher[number + 1][0] > student[number][0]
    assert {held for _, held in (*teacher, *student)} == {CHUNK_BYTES}


@needs_gpu
def test_memory_on_a_gpu() -> None:
    """What torch.cuda counts: the budget, the hidden state that the tap sees, and the selected rows in fp32; nothing else."""
    device, width = torch.device("cuda"), 1024
    case = Case([(8, 120)] * 8, grid(1, 1, 1, (3,)), grid(1, 1, 1, (3,)))
    wire = Wire("bf16", width)
    budget = 3 * 120 * 2 * wire.state_bytes
    plan, _ = planned(case, budget, wire)
    assert len(plan.chunks) == 4
    config = DistillConfig(spool_bytes=ByteSize(budget))
    hidden = torch.randn(128, 1, width, dtype=torch.bfloat16, device=device)
    spool = Spool(plan, 0, wire, config, Platform(device, "cpu:gloo,cuda:nccl"), teaches=True, learns=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for number in range(len(plan.chunks)):
        delivery = spool.open(number)
        for micro_batch in range(2):
            for layer in (1, 2, 3):
                delivery.put(layer, micro_batch, hidden)
        spool.close(number)
    rows, rounding = 120 * width * 4, 64 * 1024
    assert torch.cuda.max_memory_allocated() - before <= budget + 2 * rows + rounding
    assert torch.cuda.memory_allocated() == before
