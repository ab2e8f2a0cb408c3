"""One way to run a function on several gloo ranks: `run_ranks(world_size, function, *args)`.

Ranks are forked from a server process that has already imported torch, mcore and transformers, so that starting two or four
of them takes tenths of a second instead of the ten seconds that their imports cost.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 90
PRELOAD = [
    "torch", "torch.distributed", "torch._dynamo", "transformers", "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2", "transformers.models.qwen3.modeling_qwen3",
    "megatron.core.models.gpt.gpt_model", "megatron.core.optimizer", "megatron.core.dist_checkpointing", "oprd_megatron.loop",
]  # fmt: skip


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = TIMEOUT_SECONDS
) -> list[Any]:
    """Call `function(*args)` on every rank of a fresh gloo world and return the results in rank order.

    `function` is importable (defined at the top of a module); results go through `torch.save`. A rank that fails fails the
    test with its traceback; the others are ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_run, args=(folder, rank, world_size, function, args), daemon=False)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        failed = _join(ranks, timeout_seconds)
        errors = sorted(Path(folder).glob("*.error"), key=lambda path: path.stat().st_mtime_ns)  # the cause comes first
        if errors:
            raise AssertionError(f"rank {errors[0].stem} of {world_size} failed:\n{errors[0].read_text()}")
        assert not failed, f"ranks {failed} of {world_size} died or hung without a traceback"
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)]


def _join(ranks: list[Any], timeout_seconds: float) -> list[int]:
    """Wait for all ranks, end them all once one has failed, and return those that did not exit cleanly, first to fail first."""
    deadline = datetime.datetime.now() + datetime.timedelta(seconds=timeout_seconds)
    while any(process.is_alive() for process in ranks) and datetime.datetime.now() < deadline:
        if any(process.exitcode not in (None, 0) for process in ranks):
            break
        for process in ranks:
            process.join(0.02)
    culprits = [rank for rank, process in enumerate(ranks) if process.exitcode not in (None, 0)]
    for process in ranks:
        process.join(0 if culprits else 1)
        if process.is_alive():
            process.terminate()
            process.join()
    return culprits + [rank for rank, process in enumerate(ranks) if process.exitcode != 0 and rank not in culprits]


def _run(folder: str, rank: int, world_size: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=TIMEOUT_SECONDS),
        )
        torch.save(function(*args), Path(folder, f"{rank}.pt"))
        if dist.is_initialized():  # an entry point under test closes it itself
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)
