"""Rounding weights to another dtype, block by block, without torch: to nearest even, as torch does."""

from __future__ import annotations

import ml_dtypes
import numpy as np

_NUMPY = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def cast(block: memoryview, source: str, target: str) -> memoryview:
    """The numbers of `block` (bytes) in another dtype; the block itself if it has that dtype.

    Args:
        source, target: F64, F32, F16 or BF16.
    """
    if source == target:
        return block
    with np.errstate(over="ignore"):  # a number beyond float16's range becomes infinite, as in torch
        found = np.frombuffer(block, _NUMPY[source]).astype(_NUMPY[target])
    return found.view(np.uint8).data
