"""What this process is doing: the phase it is in, its step, and whether anything moves.

There is one `here` for a process, as there is one for each logger's name: rooms that work for long say so without being handed
anything. Three words:

    with here.phase("student"):     what is being done; phases may hold phases
    here.mark()                     something moved: a token was written, a micro-batch went forward
    with here.waiting():            inside of a phase: others are being waited for, which is no work of this rank

The heartbeat tells other ranks (`heartbeat.py`), a world in which nothing moves hangs (`hang.py`), and what is not spent
waiting is compared between ranks (`oprd_megatron/stragglers.py`).
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STARTING = "start"
"""The phase of a process that has not named one."""
WAITS_IN = ("torch/distributed/", "torch/cuda/")
"""A call of these that does not return waits for other ranks, or for the GPU, which mostly waits for other ranks."""


@dataclass(frozen=True)
class Place:
    """Where a rank is.

    Attributes:
        host: of the rank.
        step: the one it works on, counted from 1; None outside of training.
        phase: the innermost.
        seconds: since it was entered.
        still: seconds since something moved.
        waits: its main thread is in a call that waits for other ranks.
        line: of code that the main thread is in, the innermost of this project's: "trainer.py:130 step".
    """

    host: str
    step: int | None
    phase: str
    seconds: float
    still: float
    waits: bool
    line: str

    def __str__(self) -> str:
        return f"phase {self.phase}" if self.step is None else f"phase {self.phase} of step {self.step}"


class Activity:
    """Written by the thread that works, read by the heartbeat's."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.marks = 0
        """Counts up whenever something moves."""
        self.waited = 0.0
        """Seconds inside of `waiting`."""
        self._phases = [(STARTING, time.monotonic())]
        self._marked = time.monotonic()
        self._waiting = 0

    def mark(self) -> None:
        """Something moved."""
        self.marks += 1
        self._marked = time.monotonic()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Be in a phase for the length of the block. A block that ends with an error leaves its name: things ended there."""
        self._phases.append((name, time.monotonic()))
        self.mark()
        yield
        self._phases.pop()
        self.mark()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block as waiting for others."""
        start = time.perf_counter()
        self._waiting += 1
        yield
        self._waiting -= 1
        self.waited += time.perf_counter() - start
        self.mark()

    def place(self) -> Place:
        """Where this rank is now."""
        (phase, since), now = self._phases[-1], time.monotonic()
        waits, line = _main_thread()
        waits = waits or self._waiting > 0
        return Place(socket.gethostname(), self.step, phase, now - since, now - self._marked, waits, line)


here = Activity()
"""This process's."""


def _main_thread() -> tuple[bool, str]:
    """(whether it waits for others, the innermost line of this project that it is in)."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = list(traceback.walk_stack(frame))
    waits = bool(stack) and any(part in stack[0][0].f_code.co_filename for part in WAITS_IN)
    for inner, number in stack:
        path = Path(inner.f_code.co_filename)
        if "oprd_megatron" in path.parts or "checkpoints_conversion" in path.parts:
            return waits, f"{path.name}:{number} {inner.f_code.co_name}"
    return waits, f"{Path(stack[0][0].f_code.co_filename).name}:{stack[0][1]}" if stack else "not in Python"
