"""A conversion that takes its time, to be killed: `python slow_conversion.py OUT WORKERS SECONDS_A_TENSOR`."""

import functools
import sys
import time
from pathlib import Path

import numpy as np

from checkpoints_conversion.convert.hf_files import HFFilesJob, PlannedTensor, plan_hf_files, write_index
from checkpoints_conversion.convert.jobs import publish, run_job, staging_of
from checkpoints_conversion.convert.progress import Progress
from checkpoints_conversion.files.source import TensorSource

SHAPES = {f"model.layers.{i}.w": (20 + i, 30) for i in range(24)}
SHARD_BYTES = 8000


class SlowSource(TensorSource):
    """Tensors whose numbers follow from their names."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def shape(self, name: str) -> tuple[int, ...]:
        return SHAPES[name]

    def dtype(self, name: str) -> str:
        return "F32"

    def read_into(self, name: str, row: int, rows: int, columns: tuple[int, int] | None, out: memoryview) -> None:
        time.sleep(self._seconds)
        out[:] = expected(name)[row : row + rows].tobytes()


def expected(name: str) -> np.ndarray:
    """What a tensor holds."""
    return np.random.default_rng(sum(name.encode())).standard_normal(SHAPES[name]).astype(np.float32)


def job(seconds: float, **identity: object) -> HFFilesJob:
    """Nine files or so, of two or three tensors each."""
    files = plan_hf_files([PlannedTensor(name, "F32", shape) for name, shape in SHAPES.items()], SHARD_BYTES)
    return HFFilesJob(files, functools.partial(SlowSource, seconds), {"kind": "slow", **identity})


def convert(out: Path, workers: int, seconds: float) -> None:
    """Convert to `out`, going on from what is there."""
    work, staging = job(seconds), staging_of(out)
    records = run_job(work, staging, workers, Progress())
    write_index(staging, records)
    publish(staging, out, {"identity": work.identity, "files": records})


if __name__ == "__main__":
    convert(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
