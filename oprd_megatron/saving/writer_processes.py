"""The processes that write a checkpoint live as long as their rank: not longer, even if it is killed, so that they cannot write
into what a next life makes; and not shorter, when a signal that asks the run to stop reaches them too.

Light to import: mcore's helper is a fresh interpreter.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.managers import SyncManager
from queue import Queue
from typing import Any

PR_SET_PDEATHSIG = 1
"""Of Linux' prctl: a signal for when the thread ends that started this process, which is a rank's main thread."""


def results_queue() -> Queue[Any]:
    """A queue in a process of its own, by which a rank gets its writers' results."""
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(initializer=live_with, initargs=(os.getpid(),))
    return manager.Queue()


def as_writer(parent: int, write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """What a rank (process `parent`) forks to write in the background; what this forks in turn lives with it."""
    os.register_at_fork(after_in_child=_die_with_parent)
    live_with(parent)
    write(*args, **kwargs)


def live_with(parent: int) -> None:
    """Let this process end with its parent, and only then."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    _die_with_parent()
    if os.getppid() != parent:  # it died before it was watched
        os._exit(1)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
