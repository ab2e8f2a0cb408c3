#!/usr/bin/env python
"""Time and memory of a weight update of a real vLLM server, through shared memory.

    python tools/benchmark_weight_sync.py --python .venv-vllm/bin/python [--model models/smollm2-135m-instruct]

Starts a server on loopback and updates it with the model's own weights in fp32, once to warm up and then `repeats` times.
Reported are the seconds of an update (median, with its parts), and the most memory above what there was before the update,
in buckets: this process's resident set and the files in shared memory together, sampled every millisecond. The exit code is
1 if either is above its bar.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated

import psutil
import torch
import typer
from safetensors.torch import load_file

from oprd_megatron.config.rollout import ServerConfig, VLLMConfig
from oprd_megatron.rollout.vllm.client import ServerClient, Vocabulary
from oprd_megatron.rollout.vllm.processes import start_server, wait_ready
from oprd_megatron.rollout.vllm.weight_transfer import SHARED_MEMORY, BucketSender, SyncReport, TransferFolder

MAX_SECONDS, MAX_BUCKETS = 3.0, 2.0
SLACK = 0.1
"""Buckets that the interpreter's own needs may add: headers, requests, threads."""


class PeakMemory:
    """The most memory above that at the start: resident here, and in files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.process = folder, psutil.Process()
        self.peak = self.baseline = self._now()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._is_over.wait(0.001):
            self.peak = max(self.peak, self._now())

    def _now(self) -> int:
        held = self.process.memory_info().rss
        for path in self.folder.iterdir():
            try:
                held += path.stat().st_blocks * 512
            except FileNotFoundError:  # deleted just now
                continue
        return held


def main(
    python: Annotated[Path, typer.Option(help="Python of an environment with vLLM")],
    model: Annotated[Path, typer.Option(help="Hugging Face directory")] = Path("models/smollm2-135m-instruct"),
    repeats: Annotated[int, typer.Option(help="updates that count")] = 5,
    bucket_mib: Annotated[int, typer.Option(help="size of a bucket")] = 128,
    port: Annotated[int, typer.Option(help="on loopback")] = 8190,
) -> None:
    """Measure, print, compare with the bars."""
    weights = {
        name: tensor.float().clone() for path in model.glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    config = ServerConfig(python=python, transfer="shm")
    with tempfile.TemporaryDirectory() as logs:
        vllm = VLLMConfig(enforce_eager=True)
        server = start_server(model, vllm, config, "127.0.0.1", port, Path(logs) / "server.log", "fp32", 1024, 0)
        try:
            wait_ready([server], config.ready_seconds)
            times, reports, buckets = measure(server.url, weights, repeats, bucket_mib * 2**20)
        finally:
            server.stop()
    seconds = statistics.median(times)
    parts = ", ".join(
        f"{part} {statistics.median(report.seconds[part] for report in reports):.2f}" for part in reports[0].seconds
    )
    print(f"{len(weights)} tensors, {reports[0].num_bytes / 1e6:.0f} MB, buckets of {bucket_mib} MiB")
    print(f"{seconds:.2f} s an update, median of {repeats} ({min(times):.2f} to {max(times):.2f}): {parts}")
    print(f"memory: {buckets:.2f} buckets above the baseline")
    sys.exit(seconds > MAX_SECONDS or buckets > MAX_BUCKETS + SLACK)


def measure(
    url: str, weights: dict[str, torch.Tensor], repeats: int, bucket_bytes: int
) -> tuple[list[float], list[SyncReport], float]:
    """Seconds and report of each update, and the most memory of all in buckets."""
    folder = TransferFolder(SHARED_MEMORY)
    sender = BucketSender([ServerClient(url, Vocabulary(0, ()))], folder, bucket_bytes, 120)
    times, reports, buckets = [], [], 0.0
    for version in range(repeats + 1):
        begun = time.perf_counter()
        with PeakMemory(folder.path) as memory:
            report = sender.send(version, iter(weights.items()))
        if report.failed:
            sys.exit(f"error: {report.failed[url]}")
        if version:
            times.append(time.perf_counter() - begun)
            reports.append(report)
        buckets = max(buckets, (memory.peak - memory.baseline) / bucket_bytes)
    sender.close()
    return times, reports, buckets


if __name__ == "__main__":
    typer.run(main)
