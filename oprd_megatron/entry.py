"""What every command line has in common: quiet libraries, and a user's mistake as one line with exit code 2."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from oprd_megatron.errors import StoppedEarly, UserError

EXIT_USER_ERROR = 2
EXIT_TRY_AGAIN = 75
"""EX_TEMPFAIL of sysexits.h: the same command, started again, goes on."""
OTHER_RANKS_WAIT_SECONDS = 5


@contextlib.contextmanager
def one_line_errors(code_file: Path | None = None) -> Iterator[None]:
    """Run a command. A `UserError` is printed as one line and ends the process with code 2.

    Most errors are the same on all ranks: rank 0 speaks at once, and a launcher ends the others when it is gone. A rank whose
    error is its own finds itself still there after a while, and then speaks too. No exit handlers run: those of a process
    group could wait for ranks that are gone.

    Args:
        code_file: the code is left there for who started torchrun, which knows 0 and 1 only. A rank that stopped early then
            leaves with 0: torchrun would start again what was asked to stop.
    """
    try:
        yield
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        code = EXIT_TRY_AGAIN if isinstance(error, StoppedEarly) else EXIT_USER_ERROR
        if rank != "0":
            time.sleep(OTHER_RANKS_WAIT_SECONDS)
        kind = "stopped" if isinstance(error, StoppedEarly) else "error"
        print(f"{kind}: {error}" if rank == "0" else f"{kind} on rank {rank}: {error}", file=sys.stderr)
        for child in multiprocessing.active_children():  # mcore's checkpoint writer would outlive this process
            child.kill()
        if code_file is not None:
            code_file.write_text(str(code))
            code = 0 if isinstance(error, StoppedEarly) else code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def quiet_libraries() -> None:
    """Our own warnings are shown; those that libraries give about themselves are not."""
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("oprd_megatron").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def refuse_existing(out: Path | None) -> None:
    """A result is not written over another.

    Raises:
        UserError: the file is there, or its directory is not.
    """
    if out is not None and out.exists():
        raise UserError(f"{out}: exists already; nothing is overwritten, give another --out")
    refuse_missing_directory(out)


def refuse_missing_directory(out: Path | None) -> None:
    """A result has to have a place.

    Raises:
        UserError: the directory is not there.
    """
    if out is not None and not out.parent.is_dir():
        raise UserError(f"{out}: its directory does not exist; make it first")
