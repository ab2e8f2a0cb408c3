"""The records of a run, by kind, and how far the run is."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from oprd_megatron.errors import UserError
from oprd_megatron.logging import METRICS_FILE, read_records

RECENT_STEPS = 50
QUIET_SECONDS, QUIET_TIMES = 180.0, 5
"""A run that has said nothing for so long, and so many times as long as its slowest step or evaluation took, may be gone."""


@dataclass(frozen=True)
class RunRecords:
    """The records of a run's metrics.jsonl, in order.

    Attributes:
        train, evals, benchmarks: of these kinds.
        summary: None until the run has ended.
        stopped: why it ended early, None unless that is the last that is known of it.
    """

    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    benchmarks: list[dict[str, Any]]
    summary: dict[str, Any] | None
    stopped: str | None

    @classmethod
    def read(cls, run_dir: Path) -> RunRecords:
        """Read <run_dir>/metrics.jsonl.

        Raises:
            UserError: there is no such file, or it holds no record.
        """
        path = run_dir / METRICS_FILE
        records = read_records(path)
        if not records:
            raise UserError(f"{path}: holds no record yet; train at least one step or evaluate first")
        of_kind = {kind: [r for r in records if r.get("kind") == kind] for kind in ("train", "eval", "benchmark")}
        last = records[-1]
        return cls(
            of_kind["train"],
            of_kind["eval"],
            of_kind["benchmark"],
            summary=last if last.get("kind") == "summary" else None,  # one before the last is of an earlier end
            stopped=last["reason"] if last.get("kind") == "stopped" else None,
        )

    @property
    def step(self) -> int:
        """Finished steps."""
        return int(self.train[-1]["step"]) if self.train else 0

    def seconds_left(self, total: int) -> float | None:
        """Until the last step: the recent median step, and evaluations and benchmarks as often as so far; None before the
        first step."""
        if not self.train:
            return None
        return (float(np.median(self._recent_seconds)) + sum(self._other_seconds) / self.step) * (total - self.step)

    @property
    def slowest(self) -> float:
        """Seconds of the longest that a recent step, an evaluation or a benchmark took."""
        return max([*self._recent_seconds, *self._other_seconds], default=0.0)

    @property
    def _recent_seconds(self) -> list[float]:
        return [sum(record.get("seconds", {}).values()) for record in self.train[-RECENT_STEPS:]]

    @property
    def _other_seconds(self) -> list[float]:
        return [record.get("seconds", 0.0) for record in [*self.evals, *self.benchmarks]]


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Attributes:
        state: which colour it is shown in. quiet: nothing was written for a while.
        label: the state in a word or two.
        detail: a sentence's worth.
        done: share of the steps, None where their number is not known.
    """

    state: Literal["running", "finished", "stopped", "quiet"]
    label: str
    detail: str
    done: float | None

    @classmethod
    def of(cls, records: RunRecords, total: int | None, age: float) -> Status:
        """Of a run of `total` steps, if that is known, that wrote its last record `age` seconds ago."""
        step = records.step
        steps = f"step {step} of {total}" if total else f"step {step}"
        done = step / total if total else None
        if records.summary is not None and (total is None or step >= total):
            return cls("finished", "finished", f"{steps}, in {duration(records.summary['wall_seconds'])}", done)
        if records.summary is not None:
            return cls("stopped", "stopped", f"{steps}, as run.stop_at asks; the same command goes on", done)
        if records.stopped is not None:
            return cls(
                "stopped", "stopped early", f"{steps}, because {records.stopped}; the same command goes on", done
            )
        if age > max(QUIET_SECONDS, QUIET_TIMES * records.slowest):
            return cls("quiet", "no news", f"{steps}; the last record is {duration(age)} old", done)
        left = records.seconds_left(total) if total else None
        return cls("running", "running", steps if left is None else f"{steps}, about {duration(left)} left", done)


def age_of(path: Path) -> float:
    """Seconds since a file was written."""
    return max(0.0, time.time() - path.stat().st_mtime)


def duration(seconds: float) -> str:
    """As people say it: `5.0 s`, `5 min 02 s`, `1 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"
