"""Entry points as processes of their own, forked from a server that has imported what they need: tenths of a second each."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from tests.ranks import PRELOAD

SECONDS = 120


@dataclass(frozen=True)
class Outcome:
    """What a command left."""

    code: int | None
    out: str
    err: str


def run_module(folder: Path, module: str, *arguments: str | Path) -> Outcome:
    """`python -m module arguments`, a world of one rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    files = [folder.parent / f"{folder.name}.{name}" for name in ("out", "err")]
    process = context.Process(target=_main, args=(files, module, list(map(str, arguments))))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.terminate()
        process.join()
    return Outcome(process.exitcode, *(file.read_text() for file in files))


def _main(files: list[Path], module: str, arguments: list[str]) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.stdout.flush()


def written_config(folder: Path, values: dict) -> Path:
    """run.yaml with these values."""
    path = folder / "run.yaml"
    path.write_text(yaml.dump(values))
    return path
