"""Peak memory of this process, in bytes."""

from __future__ import annotations

import resource
import sys


def peak_memory_bytes(device_type: str = "cpu") -> int:
    """The most memory this process has held so far.

    Args:
        device_type: `cuda` gives the current GPU's allocated peak (torch's allocator); `cpu` gives the resident set.
    """
    if device_type == "cuda":
        import torch  # here, so that reading the process's own peak needs no torch

        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
