#!/usr/bin/env python
"""How long training stands still for a checkpoint: saved at once, and in the background.

    python tools/benchmark_saves.py examples/quickstart.yaml run.dir=/tmp/saves rollout.max_response_tokens=16

On one rank. Each round takes a step and saves at once, then takes another, saves in the background, and takes one while that is
written. Memory is the peak of the rank and all its processes together, a shared page counted once (PSS).
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from pathlib import Path
from typing import Annotated

import psutil
import typer

from oprd_megatron.config import load_config
from oprd_megatron.entry import one_line_errors, quiet_libraries
from oprd_megatron.placing import build_all
from oprd_megatron.platform import init_distributed, select_platform
from oprd_megatron.preflight import preflight
from oprd_megatron.saving.checkpoint import FOLDER, Progress
from oprd_megatron.saving.saver import Saver
from oprd_megatron.trainer import Trainer


def main(
    config: Annotated[Path, typer.Argument(help="YAML file of a run, without its eval section.", show_default=False)],
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
    ways = {"at once": run.checkpoint, "background": run.checkpoint.model_copy(update={"asynchronous": True})}
    savers = {name: Saver(run.model_copy(update={"checkpoint": way}), platform) for name, way in ways.items()}
    figures: dict[str, list[float]] = {}

    def take_step(name: str, step: int) -> None:
        with PeakMemory() as peak:
            started = time.perf_counter()
            trainer.step(step)
            figures.setdefault(name, []).append(time.perf_counter() - started)
        figures.setdefault(f"{name}: memory, GB", []).append(peak.gigabytes)

    step = 0
    for _ in range(rounds):
        for name, saver in savers.items():
            take_step("step, alone", step)
            step += 1
            progress, started = Progress(step, trainer.weight_version), time.perf_counter()
            saver.save(student, trainer.optimizer, progress)
            figures.setdefault(f"{name}: stands still", []).append(time.perf_counter() - started)
            if name == "background":
                take_step("step, while it is written", step)
                step += 1
                saver.finish()
                figures.setdefault(f"{name}: until it counts", []).append(time.perf_counter() - started)
    [newest] = (run.run.dir / FOLDER).glob("iter_*")
    typer.echo(f"checkpoint: {sum(path.stat().st_size for path in newest.iterdir()) / 1e9:.2f} GB")
    for name, values in figures.items():
        typer.echo(f"{name:40} {statistics.median(values):8.2f}   ({min(values):.2f} to {max(values):.2f})")


class PeakMemory:
    """Follows this process and all that it forked, for the length of a `with` block."""

    def __enter__(self) -> PeakMemory:
        self.gigabytes, self._ended = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        here = psutil.Process()
        while not self._ended.wait(0.1):
            total = 0
            for process in (here, *here.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += process.memory_full_info().pss
            self.gigabytes = max(self.gigabytes, total / 1e9)


if __name__ == "__main__":
    quiet_libraries()
    with one_line_errors():
        typer.run(main)
