"""Where a run computes: CUDA with NCCL, or CPU ranks with gloo, the product's embedded default.

megatron-core assumes CUDA in a few places: it asks for `device="cuda"`, for the current CUDA device, for CUDA random
states, and recognises dtypes by `tensor.type() == "torch.cuda.FloatTensor"`. On CPU ranks `Platform.scope()` answers those
questions for the CPU while it is entered, and puts everything back when it is left. On CUDA the scope does nothing, so
that no stand-in can reach a GPU run. Everything that makes mcore run without a GPU is in this file.

Outside this file nothing asks "is there CUDA": it uses `platform.device`.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from oprd_megatron.errors import UserError


@dataclass(frozen=True)
class Platform:
    """Device of this rank and backend of its process groups."""

    device: torch.device
    backend: Literal["gloo", "cpu:gloo,cuda:nccl"]

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Run the block with mcore's CUDA questions answered for this platform. May be entered again inside itself."""
        if self.is_cuda or any(isinstance(mode, _CudaFactoriesOnCpu) for mode in _active_modes()):
            yield
            return
        with contextlib.ExitStack() as stack:
            for owner, name, stand_in in _cpu_stand_ins():
                stack.enter_context(_replaced(owner, name, stand_in))
            stack.enter_context(_CudaFactoriesOnCpu())
            yield

    def synchronize(self) -> None:
        """Wait for queued device work (a no-op on CPU), so that timings mean something."""
        if self.is_cuda:
            torch.cuda.synchronize()


def select_platform(device: Literal["auto", "cpu", "cuda"] = "auto") -> Platform:
    """Pick the platform of this rank; on CUDA also make the rank's GPU current.

    Raises:
        UserError: `cuda` was asked for and no GPU answers.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device: cuda, but torch sees no GPU; install a CUDA build of torch or use device: cpu")
    if device != "cpu" and torch.cuda.is_available():
        index, ranks_here = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if ranks_here > torch.cuda.device_count():
            raise UserError(
                f"{ranks_here} ranks on this machine, but {torch.cuda.device_count()} GPUs; start fewer ranks"
            )
        torch.cuda.set_device(index)
        return Platform(torch.device("cuda", index), "cpu:gloo,cuda:nccl")
    return Platform(torch.device("cpu"), "gloo")


def compute_capability(device: Literal["auto", "cpu", "cuda"]) -> tuple[int, int] | None:
    """Of the GPU that a run with this `run.device` computes on; None if it computes on none."""
    return torch.cuda.get_device_capability() if device != "cpu" and torch.cuda.is_available() else None


def init_distributed(platform: Platform, timeout_minutes: float = 30.0) -> None:
    """Join the world that torchrun describes, or make a world of one rank without torchrun.

    On CPU every rank gets its share of the cores (at least one thread), unless OMP_NUM_THREADS says otherwise: ranks
    that compete for cores are many times slower than ranks with a thread each.
    """
    if not platform.is_cuda and "OMP_NUM_THREADS" not in os.environ:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, available_cores() // ranks_here))
    if dist.is_initialized():
        return
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if "WORLD_SIZE" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun keeps the store, and with it the addresses of a last life; several agents may count lives differently
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(f"life/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(platform.backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        if platform.is_cuda:
            dist.barrier(
                device_ids=[platform.device.index]
            )  # NCCL connects now, with all ranks: point-to-point may not
    else:
        dist.init_process_group(platform.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def available_cores() -> int:
    """Cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _CudaFactoriesOnCpu(TorchFunctionMode):
    """Sends tensor factories, `.cuda()` and `.to("cuda")` to the CPU, and names tensor types as mcore expects them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _active_modes() -> list[Any]:
    from torch.overrides import _get_current_function_mode_stack

    return _get_current_function_mode_stack()


def _cpu_stand_ins() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, stand-in) for the CUDA calls that mcore makes outside tensor factories."""
    from megatron.core.tensor_parallel import random as mcore_random

    def set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    def get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    return [
        (torch.cuda, "current_device", lambda: torch.device("cpu")),
        (torch.cuda, "synchronize", lambda *args: None),
        (torch.cuda, "manual_seed", torch.manual_seed),
        (torch.cuda, "get_rng_state", get_rng_state),
        (torch.cuda, "set_rng_state", set_rng_state),
        (mcore_random, "_get_cuda_rng_state", get_rng_state),
        (mcore_random, "_set_cuda_rng_state", set_rng_state),
    ]


@contextlib.contextmanager
def _replaced(owner: Any, name: str, stand_in: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, original)
