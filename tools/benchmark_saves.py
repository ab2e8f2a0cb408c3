#!/usr/bin/env python
"""How long training stands still for a checkpoint: saved at once, and in the background.

    python tools/benchmark_saves.py examples/quickstart.yaml run.dir=/tmp/saves rollout.max_response_tokens=16

On one rank. Each round takes a step, saves at once, takes another, saves in the background, and takes steps until that is
written. Of the writer in the background it shows the memory that it does not share with training, as of the end of its first
step.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Annotated

import psutil
import typer

from oprd_megatron.checkpoint import FOLDER, Progress
from oprd_megatron.config import load_config
from oprd_megatron.entry import one_line_errors, quiet_libraries
from oprd_megatron.placing import build_all
from oprd_megatron.platform import init_distributed, select_platform
from oprd_megatron.preflight import preflight
from oprd_megatron.saving import Saver
from oprd_megatron.trainer import Trainer


def main(
    config: Annotated[
        Path, typer.Argument(help="YAML file of a run; its eval section is left out.", show_default=False)
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value", show_default=False)] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Measure both ways of saving."""
    run = load_config(config, [*(overrides or []), "eval=null", "rollout.buffer=false", "checkpoint.keep=1"])
    checked, platform = preflight(run, 1), select_platform(run.run.device)
    init_distributed(platform)
    teachers, student = build_all(checked, platform)
    trainer = Trainer(checked, teachers, student, platform)
    trainer.sync(0)
    savers = {}
    for name, asynchronous in (("at once", False), ("background", True)):
        checkpoint = run.checkpoint.model_copy(update={"asynchronous": asynchronous})
        savers[name] = Saver(run.model_copy(update={"checkpoint": checkpoint}), platform)
    figures: dict[str, list[float]] = {}
    step = 0
    for _ in range(rounds):
        for name, saver in savers.items():
            figures.setdefault("step, alone", []).append(seconds_of(lambda: trainer.step(step)))  # noqa: B023
            step += 1
            progress, started = Progress(step, trainer.weight_version), time.perf_counter()
            saver.save(student, trainer.optimizer, progress)
            figures.setdefault(f"{name}: stands still", []).append(time.perf_counter() - started)
            if name == "background":
                figures.setdefault("step, while it is written", []).append(seconds_of(lambda: trainer.step(step)))  # noqa: B023
                step += 1
                writers = [child for child in multiprocessing.active_children() if "Fork" in child.name]
                own = [psutil.Process(writer.pid).memory_full_info().uss for writer in writers]
                figures.setdefault("writer's own memory, GB", []).append(sum(own) / 1e9)
                saver.finish()
                figures.setdefault(f"{name}: until it counts", []).append(time.perf_counter() - started)
    [newest] = (run.run.dir / FOLDER).glob("iter_*")
    typer.echo(f"checkpoint: {sum(path.stat().st_size for path in newest.iterdir()) / 1e9:.2f} GB")
    for name, values in figures.items():
        typer.echo(f"{name:28} {statistics.median(values):8.2f}   ({min(values):.2f} to {max(values):.2f})")


def seconds_of(work) -> float:  # type: ignore[no-untyped-def]
    """How long it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    quiet_libraries()
    with one_line_errors():
        typer.run(main)
