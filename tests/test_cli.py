"""The command line, as a user starts it: one process per command, its output, exit code and files."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_origin

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from oprd_megatron.config.base import sections_in
from oprd_megatron.config.schema import RunConfig
from oprd_megatron.logging import read_records
from tests.training.runs import changed, with_layout

COMMANDS = ["train", "eval", "plan", "rollout", "export", "report", "config"]
SUBCOMMANDS = {"eval": ["held-out", "run", "grade", "compare"], "rollout": ["write", "serve"]}
LEFT_OUT = ("held-out", "write")
"""Subcommands that are meant where none is named."""


def oprd(*arguments: str | Path, preexec_fn: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "oprd_megatron.cli", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False, preexec_fn=preexec_fn,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
    )  # fmt: skip


def assert_refused(result: subprocess.CompletedProcess[str], *fragments: str) -> None:
    """Exit code 2 and exactly one line on stderr."""
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for fragment in fragments:
        assert fragment in lines[0]


def assert_done(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr and "Warning" not in result.stderr, result.stderr


def yaml_of(values: dict[str, Any], folder: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.dump(values))
    return path


def leaves(section: type, prefix: str = "") -> list[str]:
    """Dotted names of every field that is not a section; of a list of sections, `list[].field`."""
    found = []
    for name, field in section.model_fields.items():
        nested = sections_in(field.annotation)
        if get_origin(field.annotation) is list and nested:
            found += [f"{prefix}{name}[].{key}" for one in nested for key in one.model_fields]
        else:
            found += leaves(nested[0], f"{prefix}{name}.") if nested else [f"{prefix}{name}"]
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    """Every command explains itself, with an example where it takes arguments."""
    for subcommand in SUBCOMMANDS.get(command, [""]):
        result = oprd(*f"{command} {subcommand}".split(), "--help")
        assert_done(result)
        shown = command if subcommand in LEFT_OUT else f"{command} {subcommand}".strip()
        assert command == "config" or f"Example: oprd {shown} " in result.stdout


def test_top_level_help_names_every_command() -> None:
    """`oprd --help` and `oprd` alone list them; an unknown command is refused."""
    result = oprd("--help")
    assert_done(result)
    assert all(f" {command} " in result.stdout for command in COMMANDS)
    alone = oprd()
    assert (alone.stdout + alone.stderr).strip() == result.stdout.strip()
    assert oprd("destill").returncode == 2


def test_config_lists_every_field() -> None:
    """Each key once, with type and meaning; a key that several kinds of an entry have once for each."""
    result = oprd("config")
    assert_done(result)
    names = Counter(leaves(RunConfig))
    assert len(names) > 50
    lines = result.stdout.splitlines()
    for name, count in names.items():
        there = [number for number, line in enumerate(lines) if line.startswith(f"{name}: ")]
        assert len(there) == count and all(lines[at + 1].strip() for at in there), f"{name} is not explained"


@pytest.mark.parametrize("ranks", [1, 2])
def test_mistakes_are_one_line(tmp_path: Path, values: dict[str, Any], ranks: int) -> None:
    """A typo in a key, and a mistake that only the ranks find: exit code 2, one line, nothing written, no traceback."""
    values["run"]["micro_batch_size"] = 1
    config = yaml_of(values, tmp_path)
    assert_refused(oprd("train", config, "optimizer.learning_rate=1", "--nproc", str(ranks)),
                   "optimizer.learning_rate: unknown key; did you mean")  # fmt: skip
    assert_refused(oprd("train", config, "teacher.path=/no/such/model", "--nproc", str(ranks)),
                   "/no/such/model", "give the directory")  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_full_disk_is_one_line_on_two_ranks(tmp_path: Path, values: dict[str, Any]) -> None:
    """When rank 0 cannot write the first file of a checkpoint, it says so and no other rank adds a word."""
    values = with_layout(changed(values, run={"steps": 1}), dp=2)
    config = yaml_of({**values, "eval": None}, tmp_path)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))  # noqa: E731
    assert_refused(oprd("train", config, preexec_fn=limit), "iter_0000001.incomplete", "free disk space")
    assert not (tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").exists()


@pytest.mark.slow
def test_a_whole_run(tmp_path: Path, values: dict[str, Any]) -> None:
    """Train on two ranks, start again, then eval, rollout, export and report on what is there."""
    values = with_layout(changed(values, run={"steps": 2}), tp=2)
    config, run = yaml_of(values, tmp_path), tmp_path / "run"

    first = oprd("train", config)
    assert_done(first)
    assert "before" in first.stdout and str(run / "report.html") in first.stdout
    assert f"student      {run / 'student_hf'}" in first.stdout
    student = load_file(run / "student_hf" / "model.safetensors")
    steps = [record for record in read_records(run / "metrics.jsonl") if record["kind"] in ("train", "eval")]

    again = oprd("train", config)
    assert_done(again)
    assert "steps        2" in again.stdout
    assert [record for record in read_records(run / "metrics.jsonl") if record["kind"] in ("train", "eval")] == steps
    for name, tensor in load_file(run / "student_hf" / "model.safetensors").items():
        assert torch.equal(tensor, student[name]), name

    evaluate(config, run, tmp_path, steps)
    rollout(config, run, tmp_path)
    export(run, tmp_path, student)
    page = run / "report.html"
    page.unlink()
    result = oprd("report", run)
    assert_done(result)
    assert result.stdout.strip() == str(page) and page.stat().st_size > 10_000


def evaluate(config: Path, run: Path, folder: Path, steps: list[dict[str, Any]]) -> None:
    """The checkpoint and the exported directory score what the run measured last; the table and the json agree."""
    last = [record for record in steps if record["kind"] == "eval"][-1]
    one_rank = ["student.parallel={}", "teacher.parallel={}"]
    for weights, overrides in ((run, []), (run / "student_hf", one_rank)):
        out = folder / f"{weights.name}.json"
        result = oprd("eval", config, *overrides, "--weights", weights, "--out", out)
        assert_done(result)
        record = json.loads(out.read_text())
        assert record["kl"] == pytest.approx(last["kl"], rel=1e-5)
        assert record["tokens"] == last["tokens"]
        assert f"{record['kl']:.4f}" in result.stdout
    assert_refused(oprd("eval", config, "--weights", folder / "held_out.jsonl"), "held_out.jsonl", "neither")
    assert_refused(oprd("eval", config, "--out", out), str(out), "exists already")


def rollout(config: Path, run: Path, folder: Path) -> None:
    """One line a response; an existing file is left as it is."""
    out = folder / "rollouts.jsonl"
    result = oprd("rollout", config, "--out", out, "--weights", run / "student_hf", "--steps", "2")
    assert_done(result)
    assert "16 responses" in result.stdout
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["step"], line["sample_index"]) for line in lines] == [(s, i) for s in range(2) for i in range(8)]
    assert all(line["prompt"].startswith("say ") and line["response_ids"] for line in lines)
    content = out.read_bytes()
    assert_refused(oprd("rollout", config, "--out", out), str(out), "exists already")
    assert out.read_bytes() == content


def export(run: Path, folder: Path, student: dict[str, torch.Tensor]) -> None:
    """The export of the checkpoint is the run's own, bit for bit, and transformers loads it; nothing is overwritten."""
    out = folder / "exported"
    assert_done(oprd("export", run, out))
    tensors = load_file(out / "model.safetensors")
    assert set(tensors) == set(student)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, student[name]), name
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == 4
    assert AutoTokenizer.from_pretrained(out)("say")["input_ids"]
    assert_refused(oprd("export", run, out), str(out), "not empty")
    assert_refused(oprd("export", folder, folder / "other"), "no checkpoint here")
