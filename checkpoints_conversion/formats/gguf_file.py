"""GGUF files (llama.cpp): a header that is checked before anything is believed, and rows dequantised on demand.

    "GGUF", version, number of tensors, number of settings
    settings     name, type, value: numbers, strings, arrays; the tokenizer's vocabulary too
    tensors      name, dimensions (columns first), type, position
    data         from the next multiple of the alignment on; positions count from there

A quantised row is a whole number of blocks, and each block stands for itself, so any rows can be read alone. The package
`gguf` knows the block formats. Its own reader of headers is not used: a flipped bit in the length of an array makes
it loop forever, and it maps the file into memory.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_conversion.files.messages import reason, shown
from checkpoints_conversion.files.regular_file import open_regular, read_at
from oprd_megatron.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_SETTINGS = 2**16
MAX_TENSORS = 2**20
MAX_ARRAY = 2**22
"""In one array: the largest vocabularies have 300,000 tokens and 500,000 merges."""
MAX_HEADER_BYTES = 2**28
MAX_NAME_BYTES = 256
MAX_DIMS = 4
MAX_SIZE = 2**48
BLOCK_BYTES = 4 * 2**20
"""Rows are dequantised in pieces of about this size."""

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
PLAIN_DTYPES = {
    "F32": "F32",
    "F16": "F16",
    "BF16": "BF16",
    "F64": "F64",
    "I8": "I8",
    "I16": "I16",
    "I32": "I32",
    "I64": "I64",
}
"""Types that are no blocks; what is blocks is read as F32."""


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor; `start` is the position of its first byte in the file."""

    kind: str
    """Type in GGUF's spelling ("Q4_1")."""
    shape: tuple[int, ...]
    """Rows first."""
    start: int
    block: int
    """Numbers in one block,"""
    block_bytes: int
    """and its bytes."""

    @property
    def dtype(self) -> str:
        """What rows are read as, in safetensors' spelling."""
        return PLAIN_DTYPES.get(self.kind, "F32")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, of the only one if it is a vector."""
        return self.shape[-1] // self.block * self.block_bytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


class GGUFFile:
    """One open file: its settings by name, its tensors by GGUF name."""

    def __init__(self, path: Path) -> None:
        """Open and check.

        Raises:
            CheckpointError: not a regular file, not GGUF, truncated, damaged, of a type that `gguf` cannot dequantise; or
                the package is not installed.
        """
        self._blocks = _block_sizes()
        self.path = path
        self._fd = open_regular(path)
        try:
            self._read_header()
        except _Malformed as error:
            self.close()
            raise CheckpointError(f"{path}: truncated or damaged GGUF file ({error}); download it again") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def rows(self, name: str, row: int, rows: int) -> Iterator[np.ndarray]:
        """Rows `row:row + rows` of a matrix, some at a time, dequantised to fp32; of plain types the bytes [n, row_bytes]."""
        info = self.tensors[name]
        count = max(1, BLOCK_BYTES // (4 * info.shape[-1]))
        for first in range(row, row + rows, count):
            raw = np.empty((min(count, row + rows - first), info.row_bytes), np.uint8)
            read_at(self._fd, info.start + first * info.row_bytes, raw.data.cast("B"), self.path)
            yield raw if info.kind in PLAIN_DTYPES else _dequantised(raw, info.kind)

    def _read_header(self) -> None:
        size = os.fstat(self._fd).st_size
        header = _Header(self._fd, size)
        if header.take(4) != MAGIC:
            raise _Malformed("it does not begin with GGUF")
        version = header.number("<I")
        if version not in VERSIONS:
            order = " on a big-endian machine" if version & 0xFFFF == 0 else ""
            raise CheckpointError(f"{self.path}: GGUF version {version}{order}; only versions 2 and 3 are read")
        num_tensors, num_settings = header.number("<Q"), header.number("<Q")
        if num_tensors > MAX_TENSORS or num_settings > MAX_SETTINGS:
            raise _Malformed(f"it claims {num_tensors} tensors and {num_settings} settings")
        self.settings: dict[str, Any] = {}
        for _ in range(num_settings):
            name = header.name()
            if name in self.settings:
                raise _Malformed(f"{shown(name)} is there twice")
            self.settings[name] = header.value(header.number("<I"))
        alignment = self.settings.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 2**16 or alignment & (alignment - 1):
            raise _Malformed("its alignment is no power of two")
        entries = [self._tensor(header) for _ in range(num_tensors)]
        data = -(-header.position // alignment) * alignment
        self.tensors: dict[str, GGUFTensor] = {}
        for name, kind, shape, offset in entries:
            if name in self.tensors:
                raise _Malformed(f"{shown(name)} is there twice")
            info = GGUFTensor(kind, shape, data + offset, *self._blocks[kind])
            if info.start + info.nbytes > size:
                raise _Malformed(f"{shown(name)} ends at byte {info.start + info.nbytes}, the file has {size}")
            self.tensors[name] = info
        for kind in {info.kind for info in self.tensors.values()} - PLAIN_DTYPES.keys():
            _refuse_unknown_blocks(kind, self._blocks[kind][1], self.path)

    def _tensor(self, header: _Header) -> tuple[str, str, tuple[int, ...], int]:
        """Name, type, shape and position in the data of the next tensor."""
        name = header.name()
        num_dims = header.number("<I")
        if not 0 < num_dims <= MAX_DIMS:
            raise _Malformed(f"{shown(name)} has {num_dims} dimensions")
        shape = tuple(reversed([header.number("<Q") for _ in range(num_dims)]))
        kind, offset = _kind_name(header.number("<I"), name, self.path), header.number("<Q")
        if not all(0 < size < MAX_SIZE for size in (*shape, offset + 1)) or shape[-1] % self._blocks[kind][0]:
            raise _Malformed(f"{shown(name)} has sizes that are no sizes")
        return name, kind, shape, offset


class _Malformed(ValueError):
    """What is wrong with a header, without the path."""


class _Header:
    """Reads on from a position; a length is compared with what is left of the file before it is believed."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd, self._left = fd, min(size, MAX_HEADER_BYTES)
        self._buffer, self._at, self._next = b"", 0, 0

    @property
    def position(self) -> int:
        return self._next - len(self._buffer) + self._at

    def take(self, length: int) -> bytes:
        """The next bytes."""
        if length > len(self._buffer) - self._at:
            if length > self._left - self.position:
                raise _Malformed(f"{length} bytes at {self.position} are not there")
            rest = self._buffer[self._at :]
            more = os.pread(self._fd, max(length, 2**20), self._next)
            self._buffer, self._at, self._next = rest + more, 0, self._next + len(more)
            if length > len(self._buffer):
                raise _Malformed(f"it ends at byte {self._next}")
        self._at += length
        return self._buffer[self._at - length : self._at]

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def string(self) -> str:
        try:
            return self.take(self.number("<Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise _Malformed("a string that is no UTF-8") from None

    def name(self) -> str:
        name = self.string()
        if not 0 < len(name) <= MAX_NAME_BYTES:
            raise _Malformed("a name that is no name")
        return name

    def value(self, kind: int) -> Any:
        """One setting."""
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise _Malformed(f"a setting of type {kind}")
        item, count = self.number("<I"), self.number("<Q")
        if item in _SCALARS and count <= MAX_ARRAY:
            size = struct.calcsize(_SCALARS[item])
            return np.frombuffer(self.take(count * size), np.dtype(_SCALARS[item])).tolist()
        if item != _STRING or count > MAX_ARRAY:
            raise _Malformed(f"an array of {count} values of type {item}")
        return [self.string() for _ in range(count)]


def _block_sizes() -> dict[str, tuple[int, int]]:
    """Numbers and bytes of a block, by type."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError:
        raise CheckpointError("reading GGUF files needs the package gguf; run: pip install gguf") from None
    return {kind.name: sizes for kind, sizes in GGML_QUANT_SIZES.items()}


def _kind_name(number: int, name: str, path: Path) -> str:
    from gguf import GGMLQuantizationType

    try:
        return GGMLQuantizationType(number).name
    except ValueError:
        raise CheckpointError(
            f"{path}: {shown(name)} has type {number}, which the installed gguf does not know; try: pip install -U gguf"
        ) from None


def _dequantised(raw: np.ndarray, kind: str) -> np.ndarray:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # a scale may be infinite or NaN; that is for who looks at the weights
        return dequantize(raw, GGMLQuantizationType[kind]).astype(np.float32, copy=False)


def _refuse_unknown_blocks(kind: str, block_bytes: int, path: Path) -> None:
    try:
        _dequantised(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError as error:
        raise CheckpointError(f"{path}: has weights of type {kind}, which gguf cannot read ({reason(error)})") from None
