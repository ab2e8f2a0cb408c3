"""Saves in the background: the bytes of a save at once, and nothing that is not whole ever counts."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from oprd_megatron.errors import UserError
from oprd_megatron.saving.retention import complete_checkpoints, step_of
from oprd_megatron.trainer import Trainer
from tests.ranks import run_ranks
from tests.training.runs import changed, student_tensors, train_on_rank, train_records, train_run, with_layout
from tests.training.test_stopping import start

TRACKER = "latest_checkpointed_iteration.txt"
SLOW_SECONDS = 3.0


def saving(values: dict[str, Any], folder: Path, **checkpoint: Any) -> dict[str, Any]:
    """Four steps, a checkpoint after each."""
    values = changed(values, run={"dir": str(folder), "steps": 4})
    return {**values, "checkpoint": {"every": 1, **checkpoint}, "eval": None}


def containers(checkpoint: Path) -> dict[str, bytes]:
    """The files that hold a checkpoint's tensors."""
    return {path.name: path.read_bytes() for path in checkpoint.glob("*.distcp")}


def test_the_same_bytes_as_at_once(tmp_path: Path, values: dict[str, Any]) -> None:
    """Weights, moments and steps of every checkpoint, though training went on while they were written; and a run goes on from
    one as from the other."""
    values = with_layout(changed(values, optimizer={"distributed": True}), tp=2)
    for kind in (False, True):
        train_run(saving(values, tmp_path / str(kind), asynchronous=kind))
    for step in range(1, 5):
        name = f"checkpoints/iter_{step:07d}"
        found = containers(tmp_path / "True" / name)
        assert len(found) >= 2 and found == containers(tmp_path / "False" / name)
    folder = tmp_path / "True" / "checkpoints"
    (folder / TRACKER).write_text("2")
    (tmp_path / "True" / "metrics.jsonl").write_text(
        "".join((tmp_path / "True" / "metrics.jsonl").read_text().splitlines(keepends=True)[:2])
    )
    again = train_run(saving(values, tmp_path / "True", asynchronous=True))
    for name, tensor in student_tensors(tmp_path / "False").items():
        assert torch.equal(tensor, student_tensors(again)[name]), name
    assert (folder / TRACKER).read_text() == "4" and not list(folder.glob("*.incomplete"))


def slow_writes(seconds: float = SLOW_SECONDS, after: int = 0) -> None:
    """Every file of a checkpoint takes a while, of those after a step."""
    write = FileSystemWriterAsync.write_preloaded_data

    def slowly(*args: Any, **kwargs: Any) -> None:
        if step_of(Path(kwargs["write_bucket"][0]).parent.with_suffix("")) > after:
            time.sleep(seconds)
        write(*args, **kwargs)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(slowly)


def watched_run(values: dict[str, Any]) -> list[tuple[int, str, bool]]:
    """(step, tracker, is there an unfinished one) at the start of each step, with slow writes."""
    slow_writes()
    found, take_step, folder = [], Trainer.step, Path(values["run"]["dir"], "checkpoints")

    def step(self: Trainer, number: int) -> dict[str, Any]:
        tracker = folder / TRACKER
        found.append((number, tracker.read_text() if tracker.exists() else "", bool(list(folder.glob("*.incomplete")))))
        return take_step(self, number)

    Trainer.step = step  # type: ignore[method-assign]
    train_on_rank(values)
    return found


def test_training_goes_on_and_nothing_counts_before_it_is_whole(tmp_path: Path, values: dict[str, Any]) -> None:
    """Steps pass while the first checkpoint is written; the next save waits for it."""
    values = saving(values, tmp_path / "run", asynchronous=True)
    values["checkpoint"]["every"] = 3
    [found] = run_ranks(1, watched_run, values)
    assert found == [(0, "", False), (1, "", False), (2, "", False), (3, "", True)]
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in complete_checkpoints(folder)] == ["iter_0000003", "iter_0000004"]
    assert (folder / TRACKER).read_text() == "4" and not list(folder.glob("*.incomplete"))


def failing_run(values: dict[str, Any], errors: str) -> str:
    """An error in the step after the first save, while that is being written."""
    slow_writes()
    take_step = Trainer.step

    def step(self: Trainer, number: int) -> dict[str, Any]:
        rank = torch.distributed.get_rank()
        if number == 1 and errors == "user":
            raise UserError("a mistake that all ranks find")
        if number == 1 and errors == "defect":
            raise KeyError(f"a defect on rank {rank}")
        return take_step(self, number)

    Trainer.step = step  # type: ignore[method-assign]
    with pytest.raises((UserError, KeyError)) as caught:
        train_on_rank(values)
    return str(caught.value)


@pytest.mark.parametrize("errors", ["user", "defect"])
def test_an_error_while_one_is_written(tmp_path: Path, values: dict[str, Any], errors: str) -> None:
    """All ranks' mistake finishes it first; a defect gives it up and leaves no process behind."""
    values = with_layout(saving(values, tmp_path / "run", asynchronous=True), dp=2)
    found = run_ranks(2, failing_run, values, errors)
    folder = tmp_path / "run" / "checkpoints"
    if errors == "user":
        assert set(found) == {"a mistake that all ranks find"}
        assert (folder / TRACKER).read_text() == "1"
    else:
        assert not (folder / TRACKER).exists()
        assert [path.name for path in folder.glob("iter_*")] == ["iter_0000001.incomplete"]


def failing_writes(values: dict[str, Any]) -> str:
    """The disk is full in the second checkpoint."""
    write = FileSystemWriterAsync.write_preloaded_data

    def full(*args: Any, **kwargs: Any) -> None:
        if "iter_0000002" in str(kwargs["write_bucket"][0]):
            kwargs["write_bucket"] = ("/dev/full", *kwargs["write_bucket"][1:])
        write(*args, **kwargs)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(full)
    with pytest.raises(UserError) as caught:
        train_on_rank(values)
    return str(caught.value)


def test_a_full_disk_in_the_background(tmp_path: Path, values: dict[str, Any]) -> None:
    """One line on every rank, when it is noticed; the checkpoint before stays the newest and the run goes on from it."""
    values = with_layout(saving(values, tmp_path / "run", asynchronous=True), dp=2)
    for error in run_ranks(2, failing_writes, values):
        assert "iter_0000002.incomplete: cannot write the checkpoint" in error and "\n" not in error
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / TRACKER).read_text() == "1"
    train_run(values)
    assert (folder / TRACKER).read_text() == "4" and not list(folder.glob("*.incomplete"))


ROOT = Path(__file__).parents[2]
SLOW_PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from oprd_megatron.entry import one_line_errors, quiet_libraries
from oprd_megatron.config import load_config
if __name__ == "__main__":
    quiet_libraries()
    from tests.training.test_background_saves import slow_writes
    slow_writes(float(sys.argv[1]), after=2)
    from oprd_megatron.loop import train
    with one_line_errors():
        train(load_config(sys.argv[2]))
"""


@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGKILL, 60), (signal.SIGTERM, 2)], ids=["kill", "term"])
def test_a_signal_while_one_is_written(
    tmp_path: Path, values: dict[str, Any], number: signal.Signals, seconds: int
) -> None:
    """Killed: no half checkpoint counts, its writers are gone too, and the run goes on from the one before. Asked to stop, with
    all its processes: they finish."""
    values = saving(values, tmp_path / "run", asynchronous=True)
    values = changed(values, run={"steps": 400})
    values["checkpoint"] |= {"every": 2}
    program = tmp_path / "slow.py"
    program.write_text(SLOW_PROGRAM.format(root=str(ROOT)))
    folder = tmp_path / "run" / "checkpoints"
    process, tree = start(values, tmp_path, program=[str(program), str(seconds)]), []
    deadline = time.monotonic() + 120
    while not ((folder / "iter_0000004.incomplete").exists() and len(tree) >= 5):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        rank = psutil.Process(process.pid)  # its queue of results, its writer, and what that forked
        tree = [rank, *rank.children(recursive=True)]
        time.sleep(0.02)
    if number == signal.SIGKILL:
        process.kill()
    else:
        for one in tree:
            os.kill(one.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (75 if number == signal.SIGTERM else -number), output
    assert psutil.wait_procs(tree, timeout=5)[1] == []
    newest = int((folder / TRACKER).read_text())
    if number == signal.SIGTERM:
        assert f"stopped: step {newest} of 400" in output and not list(folder.glob("*.incomplete"))
    else:
        assert list(folder.glob("*.incomplete"))
    values = changed(values, run={"steps": 400, "stop_at": newest + 1})
    train_run(values)
    assert train_records(tmp_path / "run")[-1]["step"] == newest + 1
    assert not list(folder.glob("*.incomplete"))
