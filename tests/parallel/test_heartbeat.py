"""A rank that dies ends all ranks, each with one line that names it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import yaml

from oprd_megatron.entry import one_line_errors
from oprd_megatron.errors import UserError
from oprd_megatron.parallel.hang import Hang
from oprd_megatron.parallel.heartbeat import heartbeat
from tests.ranks import PRELOAD
from tests.training.runs import changed, train_records

BEAT, SILENT = 0.2, 2.0
ENDS_WITHIN = 30.0
NOT_AT_ALL = 3 * SILENT
"""Long enough for a death to be seen, announced and acted on."""

ADVICE = "its own output says why. Start again: a run resumes from its last checkpoint"
SILENT_LINE = "rank {} died (no sign of life for 2 s; last in phase start); " + ADVICE
FAILED_LINE = "rank {} died (it stopped with an error in phase start); " + ADVICE
STORE_LINE = "rank 0 or its launcher died (their store has not answered for 2 s); " + ADVICE


@dataclass
class Ended:
    """How a rank ended."""

    code: int | None
    """Exit code; minus the signal's number; None: it had to be ended by the test."""
    stderr: str

    @property
    def errors(self) -> list[str]:
        """Lines for the user; torch's own warnings about a lost store and tracebacks are not among them."""
        return [line for line in self.stderr.splitlines() if line.startswith("error")]


def run_world(
    folder: Path, body: Callable[[int], None], size: int = 3, store: str = "file", hang: Hang | None = None
) -> list[Ended]:
    """Run `body(rank)` on real gloo ranks inside a heartbeat and wait until all have ended by themselves, or time is up."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    where = f"file://{folder}/store" if store == "file" else f"tcp://127.0.0.1:{free_port()}"
    ranks = [context.Process(target=on_rank, args=(folder, where, rank, size, body, hang)) for rank in range(size)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + ENDS_WITHIN
    while time.monotonic() < deadline and any(process.is_alive() and not is_stopped(process) for process in ranks):
        time.sleep(0.05)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    return [Ended(code, (folder / f"{rank}.stderr").read_text()) for rank, code in enumerate(codes)]


def on_rank(
    folder: Path, where: str, rank: int, size: int, body: Callable[[int], None], hang: Hang | None = None
) -> None:
    os.environ["RANK"] = str(rank)
    with open(folder / f"{rank}.stderr", "wb") as stderr:
        os.dup2(stderr.fileno(), sys.stderr.fileno())
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=size)
    with one_line_errors(), heartbeat(BEAT, SILENT, hang):
        body(rank)


def is_stopped(process: Any) -> bool:
    """Whether a signal has stopped it, so that it will not end."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
    return False


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(rank: int) -> None:
    """Wait for a message that never comes."""
    dist.recv(torch.zeros(1), src=rank)


def signalled(number: signal.Signals, victim: int, rank: int) -> None:
    """The victim gets a signal. Rank r waits for rank r + 1: one of them hears of a closed connection, the other never."""
    if rank == victim:
        time.sleep(2 * BEAT)
        os.kill(os.getpid(), number)
    wait_for((rank + 1) % 3)


def kill_rank_2(rank: int) -> None:
    signalled(signal.SIGKILL, 2, rank)


def kill_rank_2_and_misread_it(rank: int) -> None:
    """As a reader of checkpoints does, which takes any error for an unreadable file."""
    try:
        kill_rank_2(rank)
    except RuntimeError:
        raise UserError("cannot read the file; take another") from None


def stop_rank_2(rank: int) -> None:
    signalled(signal.SIGSTOP, 2, rank)


def kill_rank_0(rank: int) -> None:
    signalled(signal.SIGKILL, 0, rank)


def stop_rank_0(rank: int) -> None:
    signalled(signal.SIGSTOP, 0, rank)


@pytest.mark.parametrize("store", ["file", "tcp"])
@pytest.mark.parametrize(
    ("body", "code"),
    [(kill_rank_2, -signal.SIGKILL), (kill_rank_2_and_misread_it, -signal.SIGKILL), (stop_rank_2, None)],
)
def test_a_silent_rank_is_named_by_all_others(
    tmp_path: Path, body: Callable[[int], None], code: int | None, store: str
) -> None:
    """Also by rank 1, whose own collective breaks (killed), and by rank 0, which waits for a healthy rank."""
    ended = run_world(tmp_path, body, store=store)
    assert [rank.code for rank in ended] == [1, 1, code]
    assert ended[0].stderr == f"error: {SILENT_LINE.format(2)}\n"
    assert ended[1].stderr == f"error on rank 1: {SILENT_LINE.format(2)}\n"


@pytest.mark.parametrize("body", [kill_rank_0, stop_rank_0])
def test_the_store_may_die_or_freeze_with_its_host(tmp_path: Path, body: Callable[[int], None]) -> None:
    """Without torchrun rank 0 hosts the TCPStore; nothing can be announced then, and nothing need be."""
    ended = run_world(tmp_path, body, store="tcp")
    assert [rank.code for rank in ended[1:]] == [1, 1]
    assert [ended[1].errors, ended[2].errors] == [[f"error on rank {rank}: {STORE_LINE}"] for rank in (1, 2)]


def raise_on_rank_1(rank: int) -> None:
    if rank == 1:
        raise KeyError("a defect")
    wait_for(1)


def test_a_defect_keeps_its_traceback_and_is_named(tmp_path: Path) -> None:
    """At once, not after a silence; the others' broken connections are not blamed, and show no traceback."""
    started = time.monotonic()
    ended = run_world(tmp_path, raise_on_rank_1)
    assert time.monotonic() - started < ENDS_WITHIN
    assert [rank.code for rank in ended] == [1, 1, 1]
    assert "Traceback" in ended[1].stderr and "KeyError: 'a defect'" in ended[1].stderr and not ended[1].errors
    assert ended[0].stderr == f"error: {FAILED_LINE.format(1)}\n"
    assert ended[2].stderr == f"error on rank 2: {FAILED_LINE.format(1)}\n"


def mistake_on_all(rank: int) -> None:
    raise UserError("no such file; make one")


def mistake_on_rank_1(rank: int) -> None:
    if rank == 1:
        raise UserError("no such file; make one")
    wait_for(1)


def test_a_users_mistake_is_all_there_is_to_read(tmp_path: Path) -> None:
    """Exit code 2 and the one line of `one_line_errors` on every rank: nobody is called dead."""
    ended = run_world(tmp_path, mistake_on_all)
    assert [rank.code for rank in ended] == [2, 2, 2]
    assert [len(rank.stderr.splitlines()) for rank in ended] == [1, 1, 1]


def test_a_mistake_of_one_rank_ends_the_others(tmp_path: Path) -> None:
    """They would wait for it for ever where no launcher ends them."""
    ended = run_world(tmp_path, mistake_on_rank_1)
    assert [rank.code for rank in ended] == [1, 2, 1]
    assert ended[1].stderr == "error on rank 1: no such file; make one\n"
    assert ended[0].stderr == f"error: {SILENT_LINE.format(1)}\n"


def finish_at_different_times(rank: int) -> None:
    time.sleep({0: NOT_AT_ALL, 1: 0.0, 2: NOT_AT_ALL / 2}[rank])


@pytest.mark.parametrize("store", ["file", "tcp"])
def test_a_rank_that_is_done_is_not_blamed(tmp_path: Path, store: str) -> None:
    """And none waits for another: ranks end when their own work does."""
    assert run_world(tmp_path, finish_at_different_times, store=store) == [Ended(0, "")] * 3


def wait_for_a_key(rank: int) -> None:
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        time.sleep(NOT_AT_ALL)
        store.set("late", "here")
    store.get("late")
    if rank == 0:
        time.sleep(SILENT)  # it hosts the store, which the others may still be reading


def test_a_rank_that_waits_for_the_store_goes_on_beating(tmp_path: Path) -> None:
    """As when process groups are made: a TCPStore's connection is taken while it waits, so the beat has its own."""
    assert run_world(tmp_path, wait_for_a_key, store="tcp") == [Ended(0, "")] * 3


def rank_1_done_rank_2_stops(rank: int) -> None:
    if rank == 2:
        time.sleep(SILENT)
        os.kill(os.getpid(), signal.SIGSTOP)
    if rank == 0:
        time.sleep(ENDS_WITHIN)


def test_whoever_watched_a_rank_that_is_done_watches_the_next(tmp_path: Path) -> None:
    """Rank 1 is done before rank 2, which it watched, stops."""
    ended = run_world(tmp_path, rank_1_done_rank_2_stops)
    assert [rank.code for rank in ended] == [1, 0, None]
    assert ended[0].stderr == f"error: {SILENT_LINE.format(2)}\n"


def hang_up_on_rank_0(rank: int) -> None:
    if rank == 1:
        dist.destroy_process_group()
        time.sleep(ENDS_WITHIN)
    wait_for(1)


def test_a_broken_connection_between_living_ranks_is_an_error_of_its_own(tmp_path: Path) -> None:
    """No death is announced, so the error is shown after a while, and the rank that stops is the one to name."""
    ended = run_world(tmp_path, hang_up_on_rank_0, size=2)
    assert [rank.code for rank in ended] == [1, 1]
    assert "Traceback" in ended[0].stderr and "gloo" in ended[0].stderr
    assert ended[1].errors == [f"error on rank 1: {FAILED_LINE.format(0)}"]


def work_for_a_while(rank: int) -> None:
    time.sleep(4 * SILENT)


@contextlib.contextmanager
def all_stopped(processes: list[Any]) -> Iterator[None]:
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    yield
    for process in processes:
        os.kill(process.pid, signal.SIGCONT)


def test_a_job_that_is_suspended_and_continued_goes_on(tmp_path: Path) -> None:
    """A scheduler may stop all ranks for longer than a silence that counts as a death."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    where = f"file://{tmp_path}/store"
    ranks = [context.Process(target=on_rank, args=(tmp_path, where, rank, 2, work_for_a_while)) for rank in range(2)]
    for process in ranks:
        process.start()
    time.sleep(2 * SILENT)
    with all_stopped(ranks):
        time.sleep(NOT_AT_ALL)
    for process in ranks:
        process.join(ENDS_WITHIN)
    assert [process.exitcode for process in ranks] == [0, 0]


@contextlib.contextmanager
def training(values: dict[str, Any], folder: Path, agents: int) -> Iterator[list[psutil.Process]]:
    """Two ranks of a long run: under one torchrun agent, or under none, as when the agents are on machines that are gone."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(changed(values, run={"steps": 10_000}, student={"parallel": {"dp": 2}})))
    train = ["-m", "oprd_megatron.train", str(config)]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    commands = [(train, world | {"RANK": str(rank)}) for rank in range(2)]
    if agents:
        port = f"--master-port={free_port()}"
        commands = [(["-m", "torch.distributed.run", "--nproc-per-node=2", port, *train], {})]
    started = []
    for number, (arguments, own) in enumerate(commands):
        with open(folder / f"{number}.stderr", "wb") as stderr:
            environment = os.environ | own
            started.append(psutil.Popen([sys.executable, *arguments], env=environment, stdout=stderr, stderr=stderr))
    try:
        yield started
    finally:
        for process in [child for parent in started if parent.is_running() for child in parent.children()] + started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.mark.parametrize("agents", [1, 0])
def test_training_ends_within_a_minute_when_a_rank_is_killed(
    tmp_path: Path, values: dict[str, Any], agents: int
) -> None:
    """The real entry point with the real seconds: by torchrun's agent where there is one, else by the heartbeat alone."""
    metrics, output = Path(values["run"]["dir"], "metrics.jsonl"), tmp_path / "0.stderr"
    with training(values, tmp_path, agents) as started:
        deadline = time.monotonic() + 120
        while not metrics.exists() or not train_records(metrics.parent):
            assert time.monotonic() < deadline and started[0].poll() is None, output.read_text()
            time.sleep(0.2)
        ranks = started[0].children() if agents else started
        everything = [process for rank in ranks for process in (rank, *rank.children(recursive=True))]
        next(rank for rank in ranks if rank.environ()["RANK"] == "1").kill()
        codes = [process.wait(timeout=60) for process in started]
        assert psutil.wait_procs(everything, timeout=5)[1] == []
    assert codes[0] == 1, output.read_text()
    if agents:  # torchrun's own report
        assert re.search(r"Root Cause.*\brank +: 1 ", output.read_text(), re.DOTALL), output.read_text()
    else:
        errors = Ended(1, output.read_text()).errors
        place = r"phase (start|models|rollout|exchange|teacher|student|optimizer|sync|probe|eval)( of step \d+)?"
        line = rf"error: rank 1 died \(no sign of life for 20 s; last in {place}\); {ADVICE}"
        assert len(errors) == 1 and re.fullmatch(line, errors[0]), output.read_text()
        assert "Traceback" not in output.read_text()
