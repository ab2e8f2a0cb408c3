"""A server does not outlive the process that owns it, however that one ended (Linux, by pidfd).

PR_SET_PDEATHSIG would do for the server itself, but follows the thread that started it, not the process, and reaches none of
the server's own children.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time

GRACE_SECONDS = 10
"""From SIGTERM to SIGKILL."""

SERVER_PID = "OPRD_VLLM_SERVER_PID"
"""Environment variable by which a server's own children know it."""


def die_with(pid: int) -> None:
    """End this process's whole group when process `pid` ends.

    Raises:
        ProcessLookupError: it has ended already.
    """
    ended = os.pidfd_open(pid)
    threading.Thread(target=_wait, args=(ended,), name=f"die with {pid}", daemon=True).start()


def _wait(ended: int) -> None:
    select.select([ended], [], [])
    os.killpg(os.getpgrp(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.killpg(os.getpgrp(), signal.SIGKILL)
