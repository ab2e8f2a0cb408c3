"""Two processes on one device: tensor and pipeline parallelism where there is one GPU, or none.

A run of the project has one rank a GPU (`select_platform` refuses more), and NCCL refuses two ranks on one device. Here gloo
carries the collectives, with tensors on the GPU, which it copies through host memory. It sends no GPU tensors point to point,
so pipeline messages are taken through host memory here. What is compared is the layouts' arithmetic, with the GPU's kernels;
NCCL itself is not.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing

from oprd_megatron.config.schema import ParallelConfig
from oprd_megatron.entry import quiet_libraries
from oprd_megatron.platform import Platform, select_platform

from .kernels import TERMS, term_off
from .models import Figures, ours, whole

LAYOUTS = {"tp2": ParallelConfig(tp=2), "pp2": ParallelConfig(pp=2)}
NUM_RANKS = 2
TIMEOUT = datetime.timedelta(seconds=120)
"""For one collective; a stage's own limit ends what hangs elsewhere."""


def figures_on_two_ranks(folder: Path, layout: str, device: str) -> Figures:
    """A model of `folder` in fp32, split over two processes."""
    return whole(run_two_ranks(_figures, device, folder, layout))


def terms_on_two_ranks(device: str) -> float:
    """The worst relative error of output-space terms with the vocabulary split over two processes."""
    return max(run_two_ranks(_terms, device))


def _figures(platform: Platform, folder: Path, layout: str) -> Figures:
    return ours(folder, platform, LAYOUTS[layout], torch.float32)


def _terms(platform: Platform) -> float:
    return max(term_off(name, platform.device.type, torch.float32) for name in TERMS)


def run_two_ranks(function: Callable[..., Any], device: str, *args: Any) -> list[Any]:
    """Call `function(platform, *args)` on two fresh processes and return the results in rank order. A rank that fails ends the
    other, and raises here. Processes are spawned, not forked: libraries may have touched the GPU when they were imported."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_on_rank, (folder, function, device, args), nprocs=NUM_RANKS)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(NUM_RANKS)]


def _on_rank(rank: int, folder: str, function: Callable[..., Any], device: str, args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(NUM_RANKS), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(NUM_RANKS))
    quiet_libraries()
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=NUM_RANKS, timeout=TIMEOUT)
    with _on(device) as platform:
        torch.save(function(platform, *args), Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def _on(device: str) -> Iterator[Platform]:
    """This rank's platform: on a GPU the first one, whatever the rank."""
    if device == "cpu":
        torch.set_num_threads(1)
        yield select_platform("cpu")
        return
    torch.cuda.set_device(0)
    with patch.object(dist, "batch_isend_irecv", through_host):
        yield Platform(torch.device("cuda", 0), "gloo")


def through_host(operations: list[dist.P2POp]) -> list[Message]:
    """`dist.batch_isend_irecv` for tensors anywhere, over a backend that knows host memory only."""
    hosts = [operation.tensor.cpu() for operation in operations]
    staged = [dist.P2POp(op.op, host, op.peer, op.group) for op, host in zip(operations, hosts, strict=True)]
    works = BATCH_ISEND_IRECV(staged)
    received = [(op.tensor, host) if op.op is dist.irecv else None for op, host in zip(operations, hosts, strict=True)]
    return [Message(work, pair, host) for work, pair, host in zip(works, received, hosts, strict=True)]


class Message:
    """A message under way. What is received is on the device once `wait` returns; the host's copy lives as long."""

    def __init__(self, work: Any, received: tuple[torch.Tensor, torch.Tensor] | None, host: torch.Tensor) -> None:
        self.work, self.received, self.host = work, received, host

    def wait(self) -> None:
        self.work.wait()
        if self.received is not None:
            target, host = self.received
            target.copy_(host)


BATCH_ISEND_IRECV = dist.batch_isend_irecv
"""torch's own, kept from before it is replaced."""
