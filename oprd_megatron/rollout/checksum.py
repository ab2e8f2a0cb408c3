"""What is compared of two copies of a weight."""

from __future__ import annotations

import zlib

import torch


def checksum(tensor: torch.Tensor) -> int:
    """crc32 of a tensor's bytes, row by row."""
    return zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
