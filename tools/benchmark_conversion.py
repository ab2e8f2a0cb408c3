"""Speed and memory of `oprd convert` beside `cp`, in one run.

    python tools/benchmark_conversion.py --gib 8 --folder /somewhere/with/space

Makes a random checkpoint of that size (Qwen2, bf16, several files), then in turns copies it with `cp -r`, imports it and
exports the import again, each as a command of its own. Bytes of weights are divided by the time of the copying phase, which the
command says, and by the time of the whole command, start of the interpreter included. Memory is the largest sum over the
command's processes of their proportional set sizes, sampled from outside in a round of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer

from checkpoints_conversion import mappings_for, read_architecture
from checkpoints_conversion.convert.hf_files import HFFilesJob, PlannedTensor, plan_hf_files, write_index
from checkpoints_conversion.convert.jobs import JOURNAL, run_job
from checkpoints_conversion.convert.progress import Progress
from checkpoints_conversion.files.source import TensorSource

HIDDEN, FFN, VOCAB = 2048, 8192, 50_000
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": HIDDEN, "intermediate_size": FFN,
    "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "hidden_act": "silu",
}  # fmt: skip
LAYER_BYTES = 2 * (3 * HIDDEN * FFN + 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 4)


class RandomSource(TensorSource):
    """Tensors of random bytes."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._noise = np.random.default_rng(0).bytes(8 * 2**20 + 1)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    @property
    def files(self) -> list[Path]:
        return []

    def file_of(self, name: str) -> Path:
        return Path(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        return "BF16"

    def read_into(self, name: str, row: int, rows: int, columns: tuple[int, int] | None, out: memoryview) -> None:
        start = hash((name, row)) % (len(self._noise) - len(out))
        out[:] = self._noise[start : start + len(out)]

    def close(self) -> None:
        pass


def make_model(folder: Path, gib: float, max_shard_bytes: int) -> int:
    """Write a random model; returns its bytes."""
    folder.mkdir()
    layers = max(1, round((gib * 2**30 - 4 * VOCAB * HIDDEN) / LAYER_BYTES))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    shapes = {
        n: s for mapping in mappings_for(read_architecture(folder)).values() for n, s in mapping.hf_shapes.items()
    }
    files = plan_hf_files([PlannedTensor(name, "BF16", shape) for name, shape in shapes.items()], max_shard_bytes)
    records = run_job(HFFilesJob(files, lambda: RandomSource(shapes), {}), folder, 1, Progress())
    write_index(folder, records)
    (folder / JOURNAL).unlink()
    return sum(file.nbytes for file in files)


def run(command: list[str], sampled: bool) -> tuple[float, int, str]:
    """Seconds, peak bytes of the process tree (if sampled, which takes time itself), and output of a command. What was written
    before is on the disk when it starts."""
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    root, peak = psutil.Process(process.pid), 0
    while sampled and process.poll() is None:
        peak = max(peak, tree_bytes(root))
        time.sleep(0.02)
    out, err = process.communicate()
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: {err.strip()}")
    return seconds, peak, out


def warm(source: Path, copy: Path) -> None:
    """Leave as much memory freshly freed as a command will write: on a virtual machine, memory that was never used comes slower
    than memory that was, and each command is to find the same."""
    shutil.copytree(source, copy)
    shutil.rmtree(copy)


def tree_bytes(root: psutil.Process) -> int:
    """Proportional set size of a process and its children."""
    total = 0
    try:
        for process in [root, *root.children(recursive=True)]:
            total += process.memory_full_info().pss
    except psutil.Error:  # it just ended
        pass
    return total


def main(
    gib: Annotated[float, typer.Option(help="Size of the random model.")] = 4.0,
    folder: Annotated[
        Path | None, typer.Option(help="Where; needs three times that size. Left out, a temporary directory.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    workers: Annotated[int, typer.Option(min=1)] = 2,
    shard_mib: Annotated[int, typer.Option(min=1, help="Size of a file.")] = 1024,
) -> None:
    """Compare `oprd convert import` and `export` with `cp -r` of the same model."""
    root = Path(tempfile.mkdtemp(prefix="convert_", dir=folder))
    try:
        source = root / "model"
        nbytes = make_model(source, gib, shard_mib * 2**20)
        print(f"{nbytes / 2**30:.2f} GiB in {len(list(source.glob('*.safetensors')))} files, {workers} workers")
        tool = [sys.executable, "-m", "checkpoints_conversion"]
        flags = ["--workers", str(workers), "--max-shard-size", f"{shard_mib}MiB"]
        steps = {
            "cp": ["cp", "-r", str(source), str(root / "copy")],
            "import": [*tool, "import", str(source), str(root / "megatron"), *flags],
            "export": [*tool, "export", str(root / "megatron"), str(root / "back"), *flags],
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        peaks: dict[str, int] = {}
        for sampled in [True, *[False] * repeats]:
            for name, command in steps.items():
                warm(source, root / "warm")
                whole, peak, out = run(command, sampled)
                copying = re.search(r" in ([\d.]+) s", out)
                if sampled:
                    peaks[name] = peak
                else:
                    seconds[name].append((whole, float(copying[1]) if copying else whole))
                shutil.rmtree(root / "copy", ignore_errors=True)  # the page cache holds the source and two results
            if any(
                (source / file.name).read_bytes() != file.read_bytes() for file in (root / "back").glob("*.safetensors")
            ):
                print("WRONG: the round trip changed a file")
            for name in ("megatron", "back"):
                shutil.rmtree(root / name)
        report(seconds, peaks, nbytes, 2 * shard_mib + 1024)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def report(seconds: dict[str, list[tuple[float, float]]], peaks: dict[str, int], nbytes: int, bound_mib: int) -> None:
    """One line a command: medians, and the ratio to `cp` of the same round."""
    gib = nbytes / 2**30
    for name, rounds in seconds.items():
        whole, copying = (statistics.median(column) for column in zip(*rounds, strict=True))
        line = f"{name:7} {gib / whole:5.2f} GiB/s whole command"
        if name != "cp":
            pairs = list(zip(seconds["cp"], rounds, strict=True))
            of_cp = [statistics.median(cp[0] / mine[i] for cp, mine in pairs) for i in (0, 1)]
            line += f", {gib / copying:5.2f} GiB/s copying; of cp: {of_cp[0]:.2f} whole, {of_cp[1]:.2f} copying"
            line += f"; peak memory {peaks[name] / 2**20:.0f} MiB (bound {bound_mib})"
        print(line)


if __name__ == "__main__":
    typer.run(main)
