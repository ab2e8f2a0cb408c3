"""A rectangle of a Megatron parameter as a stream of bytes, made from rows of Hugging Face tensors, and the reverse.

A block stays in the processor's cache while it is read, perhaps cast, summed and written. Memory does not depend on the size
of a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from checkpoints_conversion.convert.casting import cast
from checkpoints_conversion.files.dtypes import ITEMSIZE
from checkpoints_conversion.files.source import TensorSource
from checkpoints_conversion.mappings import Copy

BLOCK_BYTES = 512 * 2**10


@dataclass(frozen=True)
class Rectangle:
    """Some rows and columns of a whole Megatron parameter, and what they are made of."""

    rows: int
    width: int
    """Numbers in a row: columns of a matrix, 1 for a vector."""
    copies: tuple[Copy, ...]
    """By rising rows of the rectangle; rows and columns without one are zero."""


def rectangle_blocks(rectangle: Rectangle, source: TensorSource, dtype: str) -> Iterator[memoryview]:
    """The bytes of a rectangle in `dtype`, row-major. A block is only valid until the next one."""
    buffer = scratch(8 * rectangle.width)
    done = 0
    for copy in rectangle.copies:
        yield from _zeros((copy.row - done) * rectangle.width * ITEMSIZE[dtype], buffer)
        stored = source.dtype(copy.hf_name)
        width_bytes = rectangle.width * ITEMSIZE[stored]
        real = rectangle.width if copy.columns is None else copy.columns[1] - copy.columns[0]
        rows_a_block = max(1, BLOCK_BYTES // width_bytes)
        for first in range(0, copy.rows, rows_a_block):
            rows = min(rows_a_block, copy.rows - first)
            block = buffer[: rows * width_bytes]
            if real == rectangle.width:
                source.read_into(copy.hf_name, copy.hf_row + first, rows, copy.columns, block.data)
            else:
                part = np.empty((rows, real * ITEMSIZE[stored]), np.uint8)
                source.read_into(copy.hf_name, copy.hf_row + first, rows, copy.columns, part.data.cast("B"))
                table = block.reshape(rows, width_bytes)
                table[:, : part.shape[1]], table[:, part.shape[1] :] = part, 0
            yield cast(block.data, stored, dtype)
        done = copy.row + copy.rows
    yield from _zeros((rectangle.rows - done) * rectangle.width * ITEMSIZE[dtype], buffer)


_scratch = np.empty(0, np.uint8)


def scratch(nbytes: int) -> np.ndarray:
    """This process's buffer, uint8, of at least a block: new memory would cost more than what is done with it."""
    global _scratch
    if len(_scratch) < max(nbytes, BLOCK_BYTES):
        _scratch = np.empty(max(nbytes, BLOCK_BYTES), np.uint8)
    return _scratch


def _zeros(nbytes: int, buffer: np.ndarray) -> Iterator[memoryview]:
    if nbytes:
        buffer[:] = 0
    while nbytes > 0:
        block = buffer[:nbytes].data
        nbytes -= len(block)
        yield block


def cut_rows(copies: Sequence[Copy], start: int, stop: int) -> tuple[Copy, ...]:
    """The parts of copies in rows `start:stop`, counted from `start`."""
    found = (copy.within(start, stop) for copy in copies)
    return tuple(copy for copy in found if copy is not None)
