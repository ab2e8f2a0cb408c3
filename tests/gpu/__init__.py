"""Tests that need a GPU, and the decorator with which a test says what it needs; elsewhere it is skipped and says so.

python -m pytest tests/gpu          all of them
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch


def needs(
    gpus: int = 1, capability: tuple[int, int] = (0, 0), transformer_engine: bool = False, vllm: bool = False
) -> pytest.MarkDecorator:
    """Skip a test unless this machine has all of it.

    Args:
        gpus: that torch sees, with a CUDA build of torch.
        capability: compute capability of the first.
        transformer_engine: its torch part is installed.
        vllm: it is installed.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    lacking = [f"{gpus} CUDA GPU{'s' * (gpus > 1)} and a CUDA build of torch"] if found < gpus else []
    if capability > (0, 0) and (not found or torch.cuda.get_device_capability() < capability):
        lacking.append(f"compute capability {capability[0]}.{capability[1]}")
    lacking += ["transformer-engine"] if transformer_engine and find_spec("transformer_engine_torch") is None else []
    lacking += ["vllm"] if vllm and find_spec("vllm") is None else []
    return pytest.mark.skipif(bool(lacking), reason=f"needs {', '.join(lacking)}")


needs_gpu = needs()
