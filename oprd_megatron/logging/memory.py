"""Memory of this process, and of all ranks."""

from __future__ import annotations

import resource
import sys

import psutil
import torch
import torch.distributed as dist


def peak_memory_bytes(device_type: str = "cpu") -> int:
    """The most memory this process has held so far.

    Args:
        device_type: `cuda` gives the current GPU's allocated peak (torch's allocator); `cpu` gives the resident set.
    """
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def world_peak_memory_bytes(device: torch.device) -> int:
    """Sum of the ranks' peaks. Collective."""
    total = torch.tensor([peak_memory_bytes(device.type)], dtype=torch.int64)
    dist.all_reduce(total)
    return int(total)


def held_memory_bytes(device_type: str = "cpu") -> int:
    """What this process holds now, of what `peak_memory_bytes` is the most of."""
    if device_type == "cuda":
        return torch.cuda.memory_allocated()
    return int(psutil.Process().memory_info().rss)


def world_memory_mib(device: torch.device) -> dict[str, list[int]]:
    """{"held": now, "peak": so far}, a number for each rank. Collective: one all-gather of two numbers."""
    held_here = held_memory_bytes(
        device.type
    )  # which the kernel counts apart from its peak, and may be a page above it
    mine = torch.tensor([held_here, max(held_here, peak_memory_bytes(device.type))], dtype=torch.int64)
    found = torch.empty(dist.get_world_size(), 2, dtype=torch.int64)
    dist.all_gather(list(found), mine)
    held, peak = (found // 2**20).T.tolist()
    return {"held": held, "peak": peak}
