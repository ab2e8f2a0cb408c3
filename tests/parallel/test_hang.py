"""A world that is alive but does not move is ended with a report that names who the others wait for."""

from __future__ import annotations

import functools
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from oprd_megatron.parallel.activity import Place, here
from oprd_megatron.parallel.hang import Hang, as_ranges, hang_line, hang_report, odd_ranks, who_dumps
from oprd_megatron.rollout.hf_engine import HFEngine
from tests.parallel.test_heartbeat import run_world, wait_for
from tests.training.runs import changed, train_on_rank, with_layout

HANG = 2.0

WAITING = Place("node", 7, "teacher", 30.0, 20.0, True, "exchange.py:9 wait")
WORKING = replace(WAITING, waits=False, line="build.py:1 read")


def in_an_endless_loop() -> None:
    while True:
        time.sleep(0.01)


def rank_1_loops(rank: int) -> None:
    here.step = 4
    with here.phase("student"):
        if rank == 1:
            in_an_endless_loop()
        wait_for(1)


def test_the_rank_that_others_wait_for_is_named(tmp_path: Path) -> None:
    """In one line on every rank; rank 0 also prints who is where, and the odd rank's stack is kept."""
    ended = run_world(tmp_path, rank_1_loops, hang=Hang(HANG, tmp_path / "hang"))
    assert [rank.code for rank in ended] == [1, 1, 1]
    for rank in ended:
        assert len(rank.errors) == 1 and "Traceback" not in rank.stderr
        assert "no rank has made progress for 2 s: rank 1 (" in rank.errors[0]
        assert (
            "is in phase student of step 4 (at " in rank.errors[0] and "and the others wait; report" in rank.errors[0]
        )
    table = ended[0].stderr.splitlines()
    assert table[1].split() == ["step", "phase", "in", "it", "for", "last", "sign", "ranks", "at"]
    assert any("student" in row and "  1  " in row and "works <- odd" in row for row in table)
    assert any("student" in row and "  0,2  " in row and "waits" in row for row in table)
    assert len(ended[2].stderr.splitlines()) == 1
    [folder] = (tmp_path / "hang").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["rank_0.txt", "rank_1.txt", "report.txt"]
    assert "in_an_endless_loop" in (folder / "rank_1.txt").read_text()
    assert ended[0].stderr.startswith((folder / "report.txt").read_text())


def rank_1_is_slow(rank: int) -> None:
    end = time.monotonic() + 2.5 * HANG
    while time.monotonic() < end:
        time.sleep(HANG / 8)
        if rank == 1:
            here.mark()


def test_one_rank_that_moves_is_progress(tmp_path: Path) -> None:
    """A long rollout on one rank, for which all others wait, is no hang."""
    ended = run_world(tmp_path, rank_1_is_slow, hang=Hang(HANG, tmp_path / "hang"))
    assert [rank.code for rank in ended] == [0, 0, 0], ended[0].stderr


def alone_and_silent(rank: int) -> None:
    with here.phase("rollout"):
        in_an_endless_loop()


def test_a_single_rank_can_hang_too(tmp_path: Path) -> None:
    """Nobody watches it but itself."""
    [ended] = run_world(tmp_path, alone_and_silent, size=1, hang=Hang(HANG, tmp_path / "hang"))
    assert ended.code == 1
    assert "it stayed in phase rollout (at " in ended.errors[0]


def test_whom_the_others_wait_for() -> None:
    """First those who do not wait themselves; where that says nothing, those who are not where most are."""
    assert odd_ranks({0: WAITING, 1: WORKING, 2: WAITING}) == [1]
    behind = replace(WAITING, phase="exchange")
    assert odd_ranks({0: WAITING, 1: behind, 2: WAITING}) == [1]
    assert odd_ranks({0: WAITING, 1: WAITING}) == []
    assert odd_ranks({0: WORKING, 1: replace(WORKING, step=6), 2: WORKING}) == [1]
    assert hang_line({0: WAITING, 1: WAITING}, 1200) == (
        "no rank has made progress for 20 min: all 2 ranks stayed in phase teacher of step 7 (at exchange.py:9 wait)"
    )
    many = {rank: WORKING if rank in range(3, 9) else WAITING for rank in range(1000)}
    assert "rank 6 (node)" in hang_line(many, 60) and "rank 7 (node)" not in hang_line(many, 60)
    assert "so are 2 more, and the others wait" in hang_line(many, 60)
    assert hang_report(many, 60).count("\n") == 4 + 6 and "0-2,9-999" in hang_report(many, 60)
    assert who_dumps(many) == [0, 3, 4, 5, 6, 7, 8]
    assert as_ranges([5, 0, 1, 2]) == "0-2,5"


def an_engine_that_does_not_answer(values: dict[str, Any], rank: int) -> None:
    """Training; rank 1's engine stops in the second step."""
    os.environ["WORLD_SIZE"] = "2"
    generate = HFEngine._generate_batch

    def never(self: HFEngine, requests: Any, params: Any, step: int, version: int) -> Any:
        if step == 1 and rank == 1:
            in_an_endless_loop()
        return generate(self, requests, params, step, version)

    HFEngine._generate_batch = never  # type: ignore[method-assign]
    train_on_rank(values)


def test_training_ends_when_an_engine_does_not_answer(tmp_path: Path, values: dict[str, Any]) -> None:
    """`run.hang_minutes` is heeded, and the report lies in the run directory."""
    values = {**with_layout(changed(values, run={"steps": 4, "hang_minutes": 0.15}), dp=2), "eval": None}
    ended = run_world(tmp_path, functools.partial(an_engine_that_does_not_answer, values), size=2)
    assert [rank.code for rank in ended] == [1, 1], ended[0].stderr
    assert "rank 1 (" in ended[0].errors[0] and "is in phase rollout of step 2 (at " in ended[0].errors[0]
    [folder] = Path(values["run"]["dir"], "hang").iterdir()
    assert "never" in (folder / "rank_1.txt").read_text()
