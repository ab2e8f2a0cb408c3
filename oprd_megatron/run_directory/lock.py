"""One run at a time in a run directory.

Rank 0 holds a POSIX record lock on <run.dir>/run.lock as long as it lives; the text in the file says who it is. The kernel
frees the lock when the process ends, however it ends, so that a dead run's lock is simply free. Such locks work on local disks,
on NFS (v4, or v3 with lockd) and on Lustre and GPFS where they are mounted with locks; where a node dies with the lock, the
server frees it when the node's lease is over. On a file system that has no locks, one line says so and the run goes on.

A record lock belongs to the process: helper processes that it forks do not hold it, and it is lost when the process closes the
file once. So nobody else in the process opens it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from oprd_megatron.errors import UserError
from oprd_megatron.parallel.agreement import together

LOCK_FILE = "run.lock"
RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
"""Variables by which torchrun and SLURM tell a process that it is not the job's first life."""
WAIT_SECONDS = 90.0
"""How long a later life waits for the lock of the one before, whose end a file server may not have noticed yet."""

messages = logging.getLogger(__name__)


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run directory, which is made if it is not there. Collective; rank 0 holds it.

    Raises:
        UserError: another run holds it; says who.
    """
    with contextlib.ExitStack() as stack:
        with together(f"locking {folder}"):
            if dist.get_rank() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context((folder / LOCK_FILE).open("a+"))
                _acquire(file, folder)
                file.truncate(0)
                file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": _now()}) + "\n")
                file.flush()
        yield


def _acquire(file: TextIO, folder: Path) -> None:
    is_later_life = any(int(os.environ.get(name) or 0) for name in RESTART_COUNTS)
    deadline = time.monotonic() + (WAIT_SECONDS if is_later_life else 0)
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                messages.warning("%s: the file system has no locks; a second run in it would not be noticed", folder)
                return
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        if time.monotonic() >= deadline:
            raise UserError(
                f"run.dir: {folder} is in use by {_holder(file)}; wait until it ends, or use another run.dir"
            )
        time.sleep(1.0)


def _holder(file: TextIO) -> str:
    """Who wrote the file; whoever holds the lock may not have written yet."""
    file.seek(0)
    text = file.read()
    if not text.endswith("\n"):
        return "another run"
    holder = json.loads(text)
    return f"the run that process {holder['pid']} on {holder['host']} started at {holder['started']}"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
