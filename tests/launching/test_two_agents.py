"""Two torchrun agents, as on two nodes, run the 72B example's twin; one of them is lost and started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from oprd_megatron.config import load_config
from tests.launching.twin import BIN, SCRIPT, environment, free_port, make_twin
from tests.ranks import run_ranks
from tests.training.runs import student_tensors, train_records

KEEP_ALIVE = "keep_alive_interval=1,keep_alive_max_attempt=3"
"""A lost agent is noticed after 3 seconds, not 15."""


@contextmanager
def agent(log: Path, port: int, overrides: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A node's torchrun, typed by hand."""
    flags = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", "--local-addr", "127.0.0.1"]
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-conf", KEEP_ALIVE]
    with log.open("ab") as file:
        process = subprocess.Popen(
            [str(BIN / "torchrun"), *flags, *meet, str(SCRIPT), *overrides], stdout=file, stderr=file,
            env=environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"),
        )  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                lose(process)


def lose(process: subprocess.Popen[bytes]) -> None:
    """The machine is gone: agent and ranks, at once."""
    ranks = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False
    ).stdout.split()
    for pid in (process.pid, *map(int, ranks)):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def wait_for(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def wait_for_meeting_point(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """The rendezvous is in the first agent's process, as on a cluster: the second one on this machine must not be faster."""
    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as door:
            if door.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def train_again(overrides: list[str]) -> None:
    from oprd_megatron.loop import train

    train(load_config(SCRIPT.with_suffix(".yaml"), overrides))


def test_an_agent_is_lost_and_started_again(tmp_path: Path) -> None:
    """The bridge is fitted first; the run goes on from its newest checkpoint, and ends like one of one piece."""
    overrides, port, run = make_twin(tmp_path), free_port(), tmp_path / "run"
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    with agent(logs[0], port, overrides) as first:
        wait_for_meeting_point(port, first, logs[0])
        with agent(logs[1], port, overrides) as second:
            wait_for(run / "checkpoints" / "latest_checkpointed_iteration.txt", first, logs[0])
            lose(second)
        assert (tmp_path / "bridge.json").exists()
        before = train_records(run)
        assert 2 <= len(before) < 8, "too late to lose anything"
        with agent(logs[1], port, overrides) as second:
            assert (second.wait(120), first.wait(30)) == (0, 0), logs[0].read_text() + logs[1].read_text()
    after = train_records(run)
    assert [record["step"] for record in after] == list(range(1, 9))
    assert after[:2] == before[:2], "steps before the checkpoint were done again: their seconds differ"
    run_ranks(2, train_again, [*overrides, f"run.dir={tmp_path}/whole"])
    found = student_tensors(run)
    for name, tensor in student_tensors(tmp_path / "whole").items():
        assert torch.equal(tensor, found[name]), name
