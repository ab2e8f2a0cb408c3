"""Ends a run early with a checkpoint: when it is asked to, or when its time is nearly up.

SIGTERM, SIGUSR1 and Ctrl-C ask (schedulers send the first two before they kill; torchrun passes SIGTERM and Ctrl-C on, and
kills after 30 s). Time is up at `run.time_limit_minutes` after the start, or at the end that SLURM gives the job
(SLURM_JOB_END_TIME), less a margin: twice the longest step so far, and what the config adds. All ranks agree after every step,
and a run that ended so exits with code 75 (EX_TEMPFAIL: try again), on which schedulers can requeue it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from oprd_megatron.config.schema import RunSection
from oprd_megatron.errors import StoppedEarly
from oprd_megatron.platform import Platform

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STEPS_OF_MARGIN = 2


class Stopping:
    """Watches for reasons to stop, for the length of a `with` block.

    A block that ends with an error gives signals their old meaning back, also one that came before: a launcher that ends this
    rank because another one failed must not wait.

    Args:
        section: `run`.
        platform: of this rank.
        started: when the run started, of `time.time`; left out, now.
    """

    def __init__(self, section: RunSection, platform: Platform, started: float | None = None) -> None:
        self.platform, self._asked = platform, False
        self._end = time_limit(section, time.time() if started is None else started)
        self._margin = 60 * section.time_margin_minutes
        self._longest = 0.0
        self._last = time.time()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():  # signals are the main thread's
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._asked and kind is not None and not issubclass(kind, StoppedEarly):
            signal.raise_signal(signal.SIGTERM)

    def reason(self) -> str | None:
        """Why to stop now; None to go on. Called after every step. Collective: one all-reduce of two numbers."""
        now = time.time()
        self._longest, self._last = max(self._longest, now - self._last), now
        is_late = self._end is not None and now + STEPS_OF_MARGIN * self._longest + self._margin >= self._end
        found = torch.tensor([float(self._asked), float(is_late)], device=self.platform.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        if found[0]:
            return "a signal asked for it"
        return "its time is nearly up" if found[1] else None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


def time_limit(section: RunSection, started: float) -> float | None:
    """When the run must have ended, of `time.time`: the earlier of the config's limit and SLURM's; None without either."""
    limits = []
    if section.time_limit_minutes is not None:
        limits.append(started + 60 * section.time_limit_minutes)
    if end := os.environ.get("SLURM_JOB_END_TIME"):
        limits.append(float(end))
    return min(limits, default=None)
