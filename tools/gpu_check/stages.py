"""Stages, what they need, and how each is run: a process in a session of its own, ended with all its children when its time is
over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from .findings import Finding, read_findings
from .settings import Settings, missing, project_requirements

LIMIT_SECONDS = 540


@dataclass(frozen=True)
class Stage:
    """A part of the check.

    Attributes:
        name: also that of its files.
        needs: packages, as pyproject.toml writes them; without one of them the stage fails in one line.
        wants: packages without which there is nothing to check; the stage is skipped.
    """

    name: str
    needs: tuple[str, ...] = ("torch",)
    wants: tuple[str, ...] = ()


def all_stages() -> list[Stage]:
    """In the order in which they run: what others rest on comes first."""
    project = tuple(project_requirements())
    return [
        Stage("env"),
        Stage("parity", project),
        Stage("train", project),
        Stage("fp8", project),
        Stage("vllm", project, wants=("vllm",)),
        Stage("bench", project),
    ]


def run_stage(stage: Stage, settings: Settings, limit_seconds: float) -> list[Finding]:
    """Run a stage to its end or its limit. Its output goes to `<out>/<name>.log`, its findings are in `<out>/<name>.jsonl`."""
    findings, log = (settings.out / f"{stage.name}.{ending}" for ending in ("jsonl", "log"))
    findings.unlink(missing_ok=True)
    unavailable = missing(list(stage.wants))
    if unavailable:
        return [Finding(stage.name, "skip", f"{', '.join(unavailable)} is not installed")]
    absent = missing(list(stage.needs))
    if absent:
        return [Finding(stage.name, "FAIL", f"missing: {', '.join(absent)}; docs/gpu.md says how to carry wheels")]
    command = [sys.executable, "-m", f"{__package__}.stage", stage.name, settings.to_json()]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        ending = _wait(process, limit_seconds)
    found = read_findings(findings)
    if ending:
        found.append(Finding(stage.name, "FAIL", f"{ending}; see {log}"))
    elif not found:
        found.append(Finding(stage.name, "FAIL", f"it found nothing; see {log}"))
    return found


def _wait(process: subprocess.Popen[bytes], limit_seconds: float) -> str:
    """Wait for a stage. Returns how it ended, empty if well. None of its processes is left."""
    started, ending = time.monotonic(), ""
    try:
        process.wait(limit_seconds)
        if process.returncode:
            ending = f"ended with code {process.returncode} after {time.monotonic() - started:.0f} s"
    except subprocess.TimeoutExpired:
        ending = f"cut after {limit_seconds:g} s"
    finally:
        _end_session(process)
    return ending


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End what the stage's session still holds, and the stage."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all gone
    process.wait()
