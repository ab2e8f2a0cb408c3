"""A rank that is slower than its peers is told from those that wait for it."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from oprd_megatron.parallel.activity import here
from oprd_megatron.representation.flow import StateFlow
from oprd_megatron.rollout.hf_engine import HFEngine
from oprd_megatron.stragglers import STEPS, Stragglers
from tests.ranks import run_ranks
from tests.training.runs import changed, train_on_rank, train_records, train_run, with_layout

DELAY = 0.4


def slow_rank_1(values: dict[str, Any], phase: str) -> list[str]:
    """Train with a rank 1 that takes longer in one phase. Returns what rank 0 warned of."""
    owner, name = {"rollout": (HFEngine, "_generate_batch"), "teacher": (StateFlow, "_teach")}[phase]
    original = getattr(owner, name)

    def slowly(*args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == 1 and here.step is not None:
            time.sleep(DELAY)
        return original(*args, **kwargs)

    setattr(owner, name, slowly)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("oprd_megatron").addHandler(handler)
    train_on_rank(values)
    return lines


def test_a_slow_rank_is_named(tmp_path: Path, values: dict[str, Any]) -> None:
    """In the phase in which it is slow, and not its peer, which waits just as long; and the numbers of training stay what they
    are without measuring anything."""
    values = {**with_layout(changed(values, run={"steps": STEPS + 1}), dp=2), "eval": None, "checkpoint": {"every": 0}}
    losses = []
    for phase in ("rollout", "teacher"):
        values = changed(values, run={"dir": str(tmp_path / phase)})
        lines = run_ranks(2, slow_rank_1, values, phase)[0]
        records = train_records(tmp_path / phase)
        for record in records:
            worst = record["stragglers"][phase]
            assert worst["rank"] == 1 and worst["excess"] > 0.6 * DELAY and worst["seconds"] >= DELAY
            assert all(of["excess"] < DELAY / 2 for other, of in record["stragglers"].items() if other != phase), record
        slow = [line for line in lines if line.startswith("slow rank: ")]
        assert len(slow) == 1 and f":1 is the slowest in phase {phase} for {STEPS} steps running" in slow[0]
        losses.append([(record["loss"], record["grad_norm"]) for record in records])
    train_run(changed(values, run={"dir": str(tmp_path / "plain")}))
    plain = [(record["loss"], record["grad_norm"]) for record in train_records(tmp_path / "plain")]
    assert losses == [plain, plain]


def followed() -> Any:
    """Four ranks: two at each of two stages; the second stage does twice the work. Rank 3 is slow in it from step 2 to 6."""
    rank = dist.get_rank()
    stragglers = Stragglers({"student": rank // 2, **({"rollout": True} if rank == 0 else {})}, factor=1.5)
    found = []
    for step in range(8):
        own = {"student": (1.0, 1.1, 2.0, 6.0 if 2 <= step < 7 else 2.2)[rank], "rollout": 5.0 if rank == 0 else 0.0}
        record = stragglers.record(own)
        found.append((record, stragglers.warnings(record)))
    return found


def test_only_peers_are_compared() -> None:
    """Stages with each other: no; a rank with an engine and those without: no. One line, when it has been slow long enough."""
    for found in run_ranks(4, followed):
        assert [set(record) for record, _ in found] == [{"student"}] * 8
        assert found[0][0]["student"]["rank"] == 3 and abs(found[0][0]["student"]["excess"] - 0.2) < 1e-9
        assert found[3][0]["student"] == {"rank": 3, "seconds": 6.0, "excess": 4.0}
        assert [len(lines) for _, lines in found] == [0] * 6 + [1, 0]
        assert ":3 is the slowest in phase student for 5 steps running, now 6 s where" in found[6][1][0]
