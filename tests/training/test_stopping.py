"""A run that is asked to stop, or has no time left, saves a checkpoint, exits with code 75 and goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from oprd_megatron.config.schema import RunSection
from oprd_megatron.stopping import time_limit
from tests.training.runs import changed, student_tensors, train_records, train_run, with_layout


def start(
    values: dict[str, Any], folder: Path, program: Sequence[str] = ("-m", "oprd_megatron.cli", "train")
) -> subprocess.Popen[str]:
    """`oprd train` of it, as a user starts it, or another program."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    command = [sys.executable, *program, str(path)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Processes of a run that train."""
    found = subprocess.run(["pgrep", "-f", "oprd_megatron.train"], capture_output=True, text=True).stdout.split()
    tree = {process.pid}
    for _ in range(3):
        tree |= {int(pid) for pid in found if int(Path(f"/proc/{pid}/stat").read_text().split()[3]) in tree}
    return [int(pid) for pid in found if int(pid) in tree]


def tell_a_rank(process: subprocess.Popen[str]) -> None:
    os.kill(ranks_of(process)[0], signal.SIGTERM)


def tell_the_command(process: subprocess.Popen[str]) -> None:
    process.terminate()


def press_ctrl_c(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does


@pytest.mark.parametrize(
    ("layout", "tell"),
    [({}, tell_the_command), ({}, press_ctrl_c), ({"tp": 2}, tell_a_rank), ({"tp": 2}, press_ctrl_c)],
    ids=["single-command", "single-ctrl-c", "tp2-rank", "tp2-ctrl-c"],
)
def test_a_signal_ends_it_with_a_checkpoint(
    tmp_path: Path, values: dict[str, Any], layout: dict[str, int], tell: Callable[[subprocess.Popen[str]], None]
) -> None:
    """It is told in the middle of a long run; the next start goes on from there and ends like a run of one piece."""
    values = {**with_layout(changed(values, run={"steps": 400}), **layout), "eval": None, "checkpoint": {"every": 0}}
    process, metrics = start(values, tmp_path), Path(values["run"]["dir"]) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    tell(process)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    done = len(train_records(metrics.parent))
    assert f"stopped: step {done} of 400 because a signal asked for it; a checkpoint is saved" in output
    assert "Traceback" not in output
    last = done + 2
    again = start(changed(values, run={"stop_at": last}), tmp_path)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert [record["step"] for record in train_records(metrics.parent)] == list(range(1, last + 1))


def test_time_is_up(tmp_path: Path, values: dict[str, Any]) -> None:
    """Again and again until it is done: the student is that of a run without a limit."""
    values = {**changed(values, run={"steps": 4, "time_limit_minutes": 1e-3, "time_margin_minutes": 0}), "eval": None}
    codes = []
    while not codes or codes[-1] == 75:
        process = start(values, tmp_path)
        output, _ = process.communicate(timeout=120)
        codes.append(process.returncode)
    assert codes == [75, 75, 75, 0], output
    whole = train_run(changed(values, run={"dir": str(tmp_path / "whole"), "time_limit_minutes": None}))
    found = student_tensors(Path(values["run"]["dir"]))
    for name, tensor in student_tensors(whole).items():
        assert torch.equal(tensor, found[name]), name


def test_the_earlier_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The config's, SLURM's, both, none."""
    section = RunSection(dir=Path("r"), time_limit_minutes=10)
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert time_limit(section, 1000.0) == 1600.0
    assert time_limit(RunSection(dir=Path("r")), 1000.0) is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1500")
    assert time_limit(section, 1000.0) == 1500.0
    assert time_limit(RunSection(dir=Path("r")), 1000.0) == 1500.0
