"""Running cases: each in a process of its own, so that none finds the memory that another left behind. There, all arms do a
step in turn, round after round, and every step is measured.

torch and what needs it are imported in the case's own process, after the allocator and the libraries are set up.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oprd_megatron.entry import EXIT_USER_ERROR, one_line_errors, quiet_libraries
from oprd_megatron.errors import UserError

from .case import Case

if TYPE_CHECKING:
    from oprd_megatron.representation.batch import Sample

    from .arms import Bench

M_MMAP_THRESHOLD = -3
"""glibc's name (malloc.h) for the size from which blocks are mapped, and so given back, one by one."""


def run_cases(cases: list[Case]) -> list[dict[str, Any]]:
    """Run one case after the other. A user's error in a case's process, which has said why, ends this one in the same way."""
    context, results = multiprocessing.get_context("spawn"), []
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="bench_update_") as name:
            folder = Path(name)
            process = context.Process(target=case_main, args=(case, folder / "model", folder / "result"))
            process.start()
            process.join()
            if process.exitcode == EXIT_USER_ERROR:
                raise SystemExit(EXIT_USER_ERROR)
            if process.exitcode:
                why = "it was killed, which usually means memory" if process.exitcode < 0 else "its output is above"
                raise UserError(f"{case}: failed, {why}; try lower --response-tokens, --vocab or --layers")
            results.append(json.loads((folder / "result").read_text()))
    return results


def case_main(case: Case, folder: Path, out: Path) -> None:
    """Measure a case in this process, and write the result to `out`."""
    os.environ["KINETO_LOG_LEVEL"] = "6"  # the profiler's own chatter
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2**20)
    quiet_libraries()
    with one_line_errors():
        from .models import make_samples, open_bench, write_model

        write_model(folder, case)
        out.write_text(json.dumps(measure(open_bench(case, folder), make_samples(case))))


def measure(bench: Bench, samples: list[Sample]) -> dict[str, Any]:
    """Measure all arms of a case, in turn."""
    import torch
    from tqdm import tqdm

    case = bench.case
    _warm_up(bench, samples[0])
    rounds: dict[str, list[dict[str, float]]] = {arm: [] for arm in case.arms}
    failed: dict[str, str] = {}
    with tqdm(total=case.rounds * len(case.arms), desc=str(case), unit="step", leave=False) as bar:
        for _ in range(case.rounds):
            for arm in case.arms:
                bar.set_postfix_str(arm)
                if arm not in failed:
                    try:
                        rounds[arm].append(step(bench, arm, samples))
                    except torch.OutOfMemoryError:
                        failed[arm] = "out of memory"
                bar.update()
    threads, device = torch.get_num_threads(), bench.platform.device
    name = torch.cuda.get_device_name() if bench.platform.is_cuda else "cpu"
    return {
        "name": str(case),
        "case": {**asdict(case), "rollouts": str(case.rollouts) if case.rollouts else None},
        "tokens": [len(sample.response_ids) for sample in samples],
        "machine": {"device": device.type, "name": name, "threads": threads, "cores": os.cpu_count(),
                    "load": os.getloadavg()[0], "torch": torch.__version__},
        "resident_bytes": bench.resident_bytes(),
        "arms": {
            arm: {"rounds": [], "failed": failed[arm]} if arm in failed else {**_medians(of), "rounds": of}
            for arm, of in rounds.items()
        },
    }  # fmt: skip


def _warm_up(bench: Bench, sample: Sample) -> None:
    """Run every arm on a short sample, and make the optimizer's state."""
    short = replace(sample, prompt_ids=sample.prompt_ids[:8], response_ids=sample.response_ids[:24])
    for arm in bench.case.arms:
        bench.optimizer.zero_grad()
        bench.run(arm, [short], lambda name: contextlib.nullcontext())
    if bench.case.optimizer:
        bench.optimizer.step()


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(of[key] for of in rounds) for key in rounds[0]}


def step(bench: Bench, arm: str, samples: list[Sample]) -> dict[str, float]:
    """Do one measured step of one arm."""
    from .meter import Meter

    bench.optimizer.zero_grad()
    with Meter(bench.platform) as meter:
        loss = bench.run(arm, samples, meter.phase)
    norm, optimizer_seconds = bench.optimizer.grad_norm(), 0.0
    if bench.case.optimizer:
        start = time.perf_counter()
        bench.optimizer.step()
        bench.platform.synchronize()
        optimizer_seconds = time.perf_counter() - start
    return {
        "loss": loss,
        "grad_norm": norm,
        "update_seconds": meter.seconds["update"],
        "teacher_seconds": meter.seconds["teacher"],
        "optimizer_seconds": optimizer_seconds,
        "peak_bytes": meter.peak["update"],
        "teacher_peak_bytes": meter.peak["teacher"],
        "left_bytes": meter.left,
        **({"peak_rss_bytes": meter.rss["update"]} if meter.rss else {}),
        **({} if bench.platform.is_cuda else {f"{of}_cpu_seconds": s for of, s in meter.cpu_seconds.items()}),
    }
