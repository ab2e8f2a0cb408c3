"""safetensors files without a memory map: a header that is checked before anything is believed, and rows on demand.

    8 bytes      length of the header, little-endian
    header       JSON: {name: {"dtype": .., "shape": [..], "data_offsets": [start, stop]}}, and "__metadata__"
    data         the tensors' bytes, row-major, without gaps; offsets count from here

A mapped file counts as the reader's memory, page by page, until the whole file is in; so rows are read into a
buffer that the caller owns (`os.preadv`), and a converter's memory does not grow with the file.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_conversion.files.dtypes import ITEMSIZE
from checkpoints_conversion.files.json_file import parse
from checkpoints_conversion.files.messages import quoted, reason, shown
from checkpoints_conversion.files.regular_file import open_regular, read_at
from oprd_megatron.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
BLOCK_BYTES = 4 * 2**20
"""Rows of which only some columns are wanted are read in blocks of about this size."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file; `start` is the position of its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


class SafetensorsFile:
    """One open file. Its header is checked against the size of the file; data is read on demand."""

    def __init__(self, path: Path) -> None:
        """Open and check.

        Raises:
            CheckpointError: not a regular file, not safetensors, truncated, longer than its header says, or damaged.
        """
        self.path = path
        self._fd = open_regular(path)
        try:
            self.tensors = _read_header(self._fd, path)
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_into(self, name: str, row: int, rows: int, columns: tuple[int, int] | None, out: memoryview) -> None:
        """Rows `row:row + rows` of a tensor, or some of their columns, into `out` (bytes, as many as these have).

        Raises:
            CheckpointError: the file became shorter after it was opened.
        """
        info = self.tensors[name]
        if not out.nbytes:
            return
        width = info.nbytes // info.shape[0] if info.shape else info.nbytes
        start = info.start + row * width
        if columns is None or (columns[1] - columns[0]) == info.shape[1]:
            self._read(start, out)
            return
        left, right = (column * ITEMSIZE[info.dtype] for column in columns)
        target = np.frombuffer(out, np.uint8).reshape(rows, right - left)
        count = max(1, BLOCK_BYTES // width)
        block = np.empty((min(count, rows), width), np.uint8)
        for first in range(0, rows, count):
            some = block[: min(count, rows - first)]
            self._read(start + first * width, some.data.cast("B"))
            target[first : first + len(some)] = some[:, left:right]

    def read_bytes(self, start: int, length: int) -> bytearray:
        """Bytes of the file as they are."""
        found = bytearray(length)
        self._read(start, memoryview(found))
        return found

    def _read(self, position: int, out: memoryview) -> None:
        read_at(self._fd, position, out, self.path)


def safetensors_header(tensors: list[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, list[int]]:
    """The first bytes of a file that holds (name, dtype, shape) in this order, and where in the file each tensor begins."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ends = [0]
    for name, dtype, shape in tensors:
        ends.append(ends[-1] + math.prod(shape) * ITEMSIZE[dtype])
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": ends[-2:]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + end for end in ends[:-1]]


def _read_header(fd: int, path: Path) -> dict[str, TensorInfo]:
    """Every tensor of the file, in order of position."""
    size = os.fstat(fd).st_size
    head = os.pread(fd, 8, 0)
    if len(head) < 8:
        raise _damaged(path, f"only {size} bytes")
    length = int.from_bytes(head, "little")
    if length > MAX_HEADER_BYTES or 8 + length > size:
        raise _damaged(path, f"its header claims {length} bytes, the file has {size}")
    try:
        header = parse(os.pread(fd, length, 8))
    except ValueError as error:
        raise _damaged(path, f"its header is not valid JSON: {reason(error)}") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    data = 8 + length
    tensors = {name: _tensor_info(name, entry, data, path) for name, entry in header.items()}
    end = data
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if info.start != end:
            raise _damaged(path, f"{shown(name)} begins at byte {info.start}, the one before it ends at {end}")
        end += info.nbytes
    if end != size:
        raise _damaged(path, f"its header accounts for {end} bytes, the file has {size}")
    return tensors


def _tensor_info(name: str, entry: Any, data: int, path: Path) -> TensorInfo:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _damaged(path, f"its header does not describe {shown(name)}") from None
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**62 for n in [*shape, start, stop]):
        raise _damaged(path, f"its header gives {shown(name)} sizes that are no sizes")
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise CheckpointError(
            f"{path}: {shown(name)} has dtype {quoted(dtype)}; only plain weights are read, dequantise it first"
        )
    if len(shape) > 8 or stop - start != math.prod(shape) * ITEMSIZE[dtype]:
        raise _damaged(path, f"the size of {shown(name)} is not that of its shape")
    return TensorInfo(dtype, tuple(shape), data + start)


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path}: truncated or damaged safetensors file ({why}); download it again")
