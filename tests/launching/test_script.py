"""examples/oprd_qwen72b_to_7b.sh as it is typed: by torchrun, bash and sbatch; what it refuses, and how it ends."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oprd_megatron.config import load_config
from oprd_megatron.errors import ConfigError, UserError
from oprd_megatron.launching.script import Arguments
from oprd_megatron.launching.world import check_world, nodes_needed
from tests.launching.twin import BIN, ROOT, SCRIPT, environment, free_port, make_twin, script
from tests.training.runs import train_records

YAML = SCRIPT.with_suffix(".yaml")
DRY_SECONDS = 10
"""Of processor time, all ranks and torchrun together: on two cores it then takes less."""


def one_line(done: subprocess.CompletedProcess[str], *fragments: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for fragment in fragments:
        assert fragment in done.stderr


def test_torchrun_plans_it(tmp_path: Path) -> None:
    """As in the README: four ranks, one speaks, and the plan is for the YAML's 32 GPUs."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [BIN / "torchrun", "--nproc-per-node", "4", "--nnodes", "1", SCRIPT, "--dry-run"],
        capture_output=True, text=True, timeout=120, check=False, cwd=ROOT, env=environment(),
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("MEMORY OF A RANK") == done.stdout.count("TIME OF A STEP") == 1
    assert "32 ranks on 4 nodes of 8" in done.stdout and "planned with the published config.json" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < DRY_SECONDS
    assert not (ROOT / "runs" / "qwen72b_to_7b").exists()


def test_a_dry_run_is_lean() -> None:
    """Neither mcore nor transformers is imported for it, and a rank that does not speak imports no torch."""
    program = "import sys; sys.argv = ['x.sh', '--dry-run']; from oprd_megatron.launching.script import main; main({!r}); print(sorted({{'torch', 'megatron', 'transformers', 'matplotlib', 'numpy'}} & set(sys.modules)))"  # noqa: E501
    for rank, allowed in (("1", "[]"), ("0", "['numpy', 'torch']")):
        command = [sys.executable, "-c", program.format(str(SCRIPT))]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment(RANK=rank), cwd=ROOT)
        assert done.stdout.splitlines()[-1] == allowed


def test_bash_plans_and_teaches() -> None:
    """Overrides reach the plan; help is for the script."""
    done = script("--dry-run", "distill.mode=none", "distill.bridge=null", "output.terms=[{kind: topk, k: 64}]")
    assert done.returncode == 0 and "LAYER MAP  none" in done.stdout, done.stderr
    helped = script("--help")
    assert helped.returncode == 0 and "oprd_qwen72b_to_7b.sh --dry-run" in helped.stdout and "75" in helped.stdout
    small = script("--dry-run", "optimizer.distributed=false", "rollout.max_response_tokens=512")
    one_line(small, "31.6 GiB too much", "ways out: optimizer.distributed=true")


@pytest.mark.parametrize(
    ("words", "variables", "fragments"),
    [
        (["optimizer.learning=1"], {}, ["optimizer.learning: unknown key", "did you mean 'lr'"]),
        (["optimizer.lr"], {}, ["expected key.sub=value"]),
        (["--dryrun"], {}, ["--dryrun: no such option", "--dry-run"]),
        ([], {}, ["4 nodes x 8 GPUs", "MASTER_ADDR"]),
        ([], {"NPROC_PER_NODE": "3"}, ["the layouts need 32 ranks", "3 GPUs", "NPROC_PER_NODE"]),
        ([], {"NPROC_PER_NODE": "many"}, ["NPROC_PER_NODE: 'many'"]),
        ([], {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}, ["SLURM gave 2 nodes", "32 ranks", "= 4 nodes x 8", "--nodes=4"]),
        ([], {"MASTER_ADDR": "here"}, ["models/Qwen2.5-72B-Instruct", "no such model directory"]),
    ],
    ids=["key", "value", "option", "master", "gpus", "words", "slurm", "models"],
)  # fmt: skip
def test_bash_refuses(words: list[str], variables: dict[str, str], fragments: list[str]) -> None:
    """Before torchrun starts: one line, exit code 2."""
    one_line(script(*words, **variables), *fragments)


def test_torchrun_refuses_another_number_of_ranks() -> None:
    """One line from the rank that speaks; torchrun's own exit code is 1, and it says that the rank's was 2."""
    done = subprocess.run(
        [BIN / "torchrun", "--nproc-per-node", "2", SCRIPT], capture_output=True, text=True, timeout=120, check=False,
        cwd=ROOT, env=environment(),
    )  # fmt: skip
    assert done.returncode == 1 and "exitcode  : 2" in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert line.startswith(
        "error: 1 node x 2 GPUs = 2 ranks, but the layouts need 32 (teacher: tp 8 x dp 4, student: tp 2 x dp 16)"
    )
    assert "start 16 nodes of 2" in line and "parallel sections" in line


@pytest.mark.parametrize(
    ("world", "nodes", "local", "fragments"),
    [
        (32, 4, 8, None),
        (16, 2, 8, ["2 nodes x 8 GPUs = 16 ranks, but the layouts need 32", "start 4 nodes of 8"]),
        (9, 3, 3, ["start 32 ranks in all"]),
        (12, 2, 8, ["12 ranks on 2 nodes, of which this one has 8", "same --nproc-per-node"]),
    ],
)
def test_ranks_that_somebody_started(world: int, nodes: int, local: int, fragments: list[str] | None) -> None:
    """What torchrun says, against the layouts."""
    given = {"WORLD_SIZE": str(world), "GROUP_WORLD_SIZE": str(nodes), "LOCAL_WORLD_SIZE": str(local)}
    config = load_config(YAML)
    if fragments is None:
        check_world(config, given)
        assert nodes_needed(config, local, {"MASTER_ADDR": "here"}) == nodes
        return
    with pytest.raises(UserError) as caught:
        check_world(config, given)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_restarts_that_would_hang() -> None:
    """torchrun's agents on several nodes must not share their store."""
    given = {"WORLD_SIZE": "32", "GROUP_WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_MAX_RESTARTS": "3"}
    config = load_config(YAML)
    with pytest.raises(ConfigError, match=r"--max-restarts: .*export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        check_world(config, {**given, "TORCHELASTIC_USE_AGENT_STORE": "True"})
    check_world(config, {**given, "TORCHELASTIC_USE_AGENT_STORE": "False"})
    check_world(config, {**given, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "0"})


def test_a_run_without_the_script_is_checked_too() -> None:
    """`torchrun .. -m oprd_megatron.train`."""
    given = {"WORLD_SIZE": "16", "GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "8", "RANK": "0"}
    command = [sys.executable, "-m", "oprd_megatron.train", str(YAML)]
    one_line(subprocess.run(command, env=os.environ | given, capture_output=True, text=True), "16 ranks", "need 32")


def test_ranks_started_by_hand() -> None:
    """Without torchrun nobody says how many ranks a node has."""
    check_world(load_config(YAML), {"WORLD_SIZE": "32"})
    with pytest.raises(UserError, match="need 32"):
        check_world(load_config(YAML), {"WORLD_SIZE": "16"})


def test_what_is_left_open_takes_any_number() -> None:
    """Without dp the layouts take what there is."""
    config = load_config(YAML, ["student.parallel={tp: 2, sp: true}", "teacher.parallel={tp: 8}"])
    check_world(config, {"WORLD_SIZE": "16", "GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "8"})


def test_arguments() -> None:
    """Options anywhere between overrides; an unknown one is refused."""
    read = Arguments.read(["a=1", "--dry-run", "--leave-code", "file", "b=-1"])
    assert (read.flags, read.values, read.overrides) == ({"--dry-run"}, {"--leave-code": "file"}, ["a=1", "b=-1"])
    with pytest.raises(ConfigError, match="--nodes: no such option"):
        Arguments.read(["--nodes", "4"])


def cluster_of_one(folder: Path) -> dict[str, str]:
    """A SLURM job on this machine: `srun` runs its command here, `scontrol` names this host and notes what it is asked."""
    for name, body in {
        "srun": 'while [[ $1 == --* ]]; do shift 2; done; exec "$@"',
        "scontrol": f'[ "$1 $2" = "show hostnames" ] && echo 127.0.0.1 || echo "$@" >> {folder}/scontrol.log',
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    given = environment(NPROC_PER_NODE="2", MASTER_PORT=str(free_port()))
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node"}
    return {**given, **job, "PATH": f"{folder}{os.pathsep}{given['PATH']}"}


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


def test_a_slurm_job_is_warned_and_requeued(tmp_path: Path) -> None:
    """sbatch runs a copy of the script; its warning ends the run with a checkpoint and 75, and the job is put back."""
    overrides, job = make_twin(tmp_path), cluster_of_one(tmp_path)
    spooled = shutil.copy(SCRIPT, tmp_path / "slurm_script")
    metrics = tmp_path / "run" / "metrics.jsonl"
    command = ["bash", spooled, *overrides, "checkpoint.every=0"]
    with (tmp_path / "job.log").open("w") as log:
        process = subprocess.Popen([*command, "run.steps=2000"], stdout=log, stderr=log, env=job, cwd=ROOT)
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") > 1):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "job.log").read_text()
            time.sleep(0.05)
        (step,) = children(process.pid)
        (agent,) = children(step)
        assert b"TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in Path(f"/proc/{agent}/environ").read_bytes().split(b"\0")
        for pid in (step, agent):  # SLURM tells every process of a step
            os.kill(pid, signal.SIGUSR1)
        assert process.wait(60) == 75, (tmp_path / "job.log").read_text()
    said = (tmp_path / "job.log").read_text()
    done = len(train_records(tmp_path / "run"))
    assert f"stopped: step {done} of 2000 because a signal asked for it" in said and "Traceback" not in said
    assert (tmp_path / "scontrol.log").read_text() == "requeue 7\n"
    assert (tmp_path / "run" / "checkpoints" / f"iter_{done:07d}").is_dir()
