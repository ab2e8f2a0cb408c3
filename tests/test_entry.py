"""How a command ends when its user made a mistake."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FAILS = """
import oprd_megatron.entry as entry
from oprd_megatron.errors import UserError

entry.OTHER_RANKS_WAIT_SECONDS = 0.1
with entry.one_line_errors():
    raise {error}("no such thing; make one")
"""


def run(rank: str, error: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RANK": rank}
    return subprocess.run(
        [sys.executable, "-c", FAILS.format(error=error)], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(("rank", "line"), [("0", "error: "), ("3", "error on rank 3: ")])
def test_a_users_mistake_is_one_line(rank: str, line: str) -> None:
    """Exit code 2 and one line, also where the mistake is known to one rank alone (the others would end first)."""
    done = run(rank, "UserError")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{line}no such thing; make one\n")


def test_a_defect_keeps_its_traceback() -> None:
    """Only what a user can mend is made short."""
    done = run("0", "KeyError")
    assert done.returncode == 1 and "Traceback" in done.stderr
