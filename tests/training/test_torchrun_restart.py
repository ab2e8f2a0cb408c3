"""torchrun starts a run again by itself, and it ends as if nothing had been."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from tests.parallel.test_heartbeat import free_port
from tests.training.runs import changed, student_tensors, train_records, train_run, with_layout


@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "background"])
def test_a_killed_rank_is_started_again(tmp_path: Path, values: dict[str, Any], asynchronous: bool) -> None:
    """One of two ranks is killed after a checkpoint; the second life resumes. Student, losses and evaluations are those of an
    uninterrupted run, to the last bit, and nothing of the first life is left."""
    values = with_layout(changed(values, run={"steps": 12}), dp=2)
    values["checkpoint"] = {"every": 3, "keep": 2, "asynchronous": asynchronous}
    run_dir, path = Path(values["run"]["dir"]), tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}",
               "--max-restarts=1", "-m", "oprd_megatron.train", str(path)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    agent = psutil.Process(process.pid)
    tracker, deadline = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt", time.monotonic() + 120
    while not tracker.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    ranks = {child.environ()["RANK"]: child for child in agent.children() if "RANK" in child.environ()}
    first_life = [one for rank in ranks.values() for one in (rank, *rank.children(recursive=True))]
    ranks["1"].kill()
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert psutil.wait_procs(first_life, timeout=5)[1] == []
    train_run(changed(values, run={"dir": str(tmp_path / "whole")}))
    for name, tensor in student_tensors(tmp_path / "whole").items():
        assert torch.equal(tensor, student_tensors(run_dir)[name]), name
    for kind, key in (("train", "loss"), ("eval", "kl")):
        found, wanted = ([(r["step"], r[key]) for r in train_records(d, kind)] for d in (run_dir, tmp_path / "whole"))
        assert found == wanted
