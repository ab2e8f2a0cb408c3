"""Two runs in one directory: the second is one line and touches nothing of the first."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import oprd_megatron.run_directory.lock
from oprd_megatron.errors import UserError
from oprd_megatron.run_directory.lock import LOCK_FILE, run_lock
from tests.ranks import PRELOAD, run_ranks
from tests.training.runs import changed, train_records, train_run
from tests.training.test_stopping import ranks_of, start


def files_below(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Times and contents."""
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_the_second_run_is_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    """The first is stopped by a signal to its ranks meanwhile, so that whatever changes is the second's doing. When the first
    was killed the directory is free."""
    values = {**changed(values, run={"steps": 400}), "eval": None, "checkpoint": {"every": 0}}
    run_dir = Path(values["run"]["dir"])
    first = start(values, tmp_path)
    deadline = time.monotonic() + 120
    while not ((run_dir / "metrics.jsonl").exists() and len(train_records(run_dir)) > 1):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.05)
    [rank] = ranks_of(first)
    os.kill(rank, signal.SIGSTOP)
    try:
        before = files_below(run_dir)
        second = start(changed(values, optimizer={"lr": 2e-4}), tmp_path)
        output, _ = second.communicate(timeout=120)
        assert second.returncode == 2, output
        errors = [line for line in output.splitlines() if "error" in line]
        assert len(errors) == 1 and f"run.dir: {run_dir} is in use by the run that process {rank} on " in errors[0], (
            output
        )
        assert files_below(run_dir) == before
    finally:
        os.kill(rank, signal.SIGKILL)
        first.communicate()
    train_run(changed(values, run={"stop_at": 1}))
    assert [record["step"] for record in train_records(run_dir)] == [1]


def hold(folder: Path, seconds: float) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with run_lock(folder):
        if os.fork() == 0:  # a helper process that outlives its rank does not hold the lock
            time.sleep(2 * seconds)
            os._exit(0)
        (folder / "held").touch()
        time.sleep(seconds)
        os._exit(1)


def take(folder: Path, wait: float, restart: str) -> str:
    oprd_megatron.run_directory.lock.WAIT_SECONDS = wait
    os.environ["TORCHELASTIC_RESTART_COUNT"] = restart
    try:
        with run_lock(folder):
            return "taken"
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(("wait", "restart", "taken"), [(60.0, "0", False), (5.0, "1", True), (0.5, "1", False)])
def test_a_restart_waits_for_the_life_before_it(tmp_path: Path, wait: float, restart: str, taken: bool) -> None:
    """A first start does not wait; a restart does, for so long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    holder = context.Process(target=hold, args=(tmp_path, 4.0))
    holder.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.02)
    [said] = run_ranks(1, take, tmp_path, wait, restart)
    assert (said == "taken") is taken, said
    assert taken or f"is in use by the run that process {holder.pid} on " in said
    holder.join()
    assert (tmp_path / LOCK_FILE).exists()
