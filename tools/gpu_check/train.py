"""Ten steps of OPRD through `oprd train`, as a user would start it, on one rank.

Tiny random models, or two that are given. Random ones have states to align like any others, so the loss falls; the probe after
every step shows that the engine which writes the text has the trained weights.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.tiny_models import tiny_hf_model

from .findings import Finding, at_most
from .settings import Settings

STEPS = 10
LOSS_BAR = {"tiny": 0.95, "given": 1.0}
"""Of the last three steps' loss over the first three's. A model that was trained before moves little in ten steps."""


def short_run(settings: Settings) -> Iterator[Finding]:
    """Train, then read what the run wrote down."""
    folder = settings.out / "train"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(run_config(settings, folder)))
    done = subprocess.run([sys.executable, "-m", "oprd_megatron.cli", "train", str(config)], check=False)
    if done.returncode:
        yield Finding("oprd train", "FAIL", f"ended with code {done.returncode}; see {settings.out / 'train.log'}")
        return
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    bar = LOSS_BAR["tiny" if settings.student is None else "given"]
    yield from read_run([json.loads(line) for line in lines], bar)


def read_run(records: list[dict[str, Any]], bar: float) -> Iterator[Finding]:
    """Findings from a finished run's metrics."""
    steps = [record for record in records if record["kind"] == "train"]
    losses = [record["loss"] for record in steps]
    yield Finding("steps", "pass" if len(steps) == STEPS else "FAIL", f"{len(steps)}", f"{STEPS}")
    first, last = statistics.fmean(losses[:3]), statistics.fmean(losses[-3:])
    yield at_most("loss, last 3 over first 3", last / first, bar, f"({first:.4g} -> {last:.4g})")
    probes = [record["probe_difference"] for record in steps]  # one above its tolerance would have stopped the run
    yield Finding("probe", "pass", f"{max(probes):.2g} nats at most between engine and trainer")
    seconds = statistics.median(sum(record["seconds"].values()) for record in steps)
    yield Finding("step", "pass", f"{seconds:.2f} s, of which " + _phases(steps))
    yield Finding("peak memory", "pass", f"{records[-1]['peak_memory_bytes'] / 2**30:.2f} GiB")


def _phases(steps: list[dict[str, Any]]) -> str:
    """The three phases that take longest."""
    medians = {name: statistics.median(record["seconds"][name] for record in steps) for name in steps[0]["seconds"]}
    longest = sorted(medians, key=lambda name: -medians[name])[:3]
    return ", ".join(f"{name} {medians[name]:.2f}" for name in longest)


def run_config(settings: Settings, folder: Path) -> dict[str, Any]:
    """The run as its YAML says it; models and prompts are written to `folder`."""
    lines = [json.dumps({"prompt": f"What is {number} times {number + 3}?"}) for number in range(32)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    given = settings.student is not None and settings.teacher is not None
    if given:
        student, teacher = Path(str(settings.student)), Path(str(settings.teacher))
    else:
        student, teacher = folder / "student", folder / "teacher"
        for path, layers, seed in ((teacher, 5, 1), (student, 4, 2)):
            tiny_hf_model(
                "llama", path, num_layers=layers, hidden_size=128, heads=4, kv_heads=2, ffn=256, seed=seed, std=0.05
            )
    widths = {json.loads((path / "config.json").read_text())["hidden_size"] for path in (student, teacher)}
    dtype = "bf16" if settings.is_cuda else "fp32"
    return {
        "run": {"dir": str(folder / "run"), "steps": STEPS, "device": settings.device, "micro_batch_size": 2, "export": False},
        "teacher": {"path": str(teacher), "dtype": dtype},
        "student": {"path": str(student), "dtype": dtype},
        "rollout": {
            "prompts": {"path": str(folder / "prompts.jsonl")},
            "prompts_per_step": 8 if settings.is_cuda else 4,
            "responses_per_prompt": 2,
            "max_response_tokens": 128 if settings.is_cuda else 16,
        },
        "distill": {"mode": "identity" if len(widths) == 1 else "linear", "positions": "all"},
        "optimizer": {"lr": 2e-5 if given else 2e-3, "warmup_fraction": 0.1},
        "logging": {"progress": False, "tensorboard": False},
    }  # fmt: skip


CHECKS = [short_run]
