"""Peak memory of this process, in bytes."""

from __future__ import annotations

import resource
import sys

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
