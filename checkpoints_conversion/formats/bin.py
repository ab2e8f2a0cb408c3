"""PyTorch's .bin files (`pytorch_model.bin`, or several with an index), without running what is in them.

Since torch 1.6 such a file is a zip container: a pickle that says which tensor is where, and the tensors' bytes, stored as
they are. The pickle is read as data (`torch_dist.pickles`), the bytes with `os.preadv`: no torch, no memory map, and
nothing that the file names is imported or called. Files of older versions have no directory, so torch itself loads
them, whole and one at a time, with `weights_only`.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from checkpoints_conversion.files.dtypes import ITEMSIZE, TORCH_NAMES
from checkpoints_conversion.files.messages import reason, shown
from checkpoints_conversion.files.regular_file import open_regular, read_at
from checkpoints_conversion.reader import FilesSource, weight_files
from checkpoints_conversion.torch_dist.container import (
    Span,
    data_start,
    is_count,
    read_data_pickle,
    read_directory,
    row_major,
    tensor_of,
)
from checkpoints_conversion.torch_dist.pickles import Malformed
from oprd_megatron.errors import CheckpointError

SINGLE_FILE = "pytorch_model.bin"
INDEX_FILE = "pytorch_model.bin.index.json"
MAX_PICKLE_BYTES = 2**26
ZIP_MAGIC = b"PK\x03\x04"
NAME_OF_TORCH = {f"torch.{torch_name}": name for name, torch_name in TORCH_NAMES.items()}


@dataclass(frozen=True)
class BinTensor:
    """One tensor of a container. `start` is the position in the file of its first number; strides count numbers."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int


class BinFile(Protocol):
    """One weight file."""

    path: Path
    tensors: dict[str, BinTensor]

    def read_into(self, name: str, row: int, rows: int, columns: tuple[int, int] | None, out: memoryview) -> None:
        """See `TensorSource`."""

    def close(self) -> None:
        """Let go of the file."""


class BinSource(FilesSource):
    """The tensors of a directory that only has .bin files."""

    def __init__(self, hf_dir: Path) -> None:
        """Open every file and find its tensors.

        Raises:
            CheckpointError: a file is missing, damaged, or holds anything but tensors by name.
        """
        super().__init__(weight_files(hf_dir, SINGLE_FILE, INDEX_FILE), _open)


def _open(path: Path) -> BinFile:
    fd = open_regular(path)
    try:
        magic = os.pread(fd, len(ZIP_MAGIC), 0)
        if magic == ZIP_MAGIC:
            return _ZipFile(path, fd)
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return _LegacyFile(path)


class _ZipFile:
    """A file of torch 1.6 or later; owns `fd` once it is made."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self._fd = path, fd
        span = Span(fd, 0, os.fstat(fd).st_size)
        try:
            self.tensors = _tensors(span)
        except Malformed as error:
            raise CheckpointError(
                f"{path}: truncated, damaged, or no state dict of plain tensors ({reason(error)}); download it again"
            ) from None

    def read_into(self, name: str, row: int, rows: int, columns: tuple[int, int] | None, out: memoryview) -> None:
        """Reads from the first to the last number that is wanted, and picks: all of it where the tensor is row-major."""
        info = self.tensors[name]
        if not out.nbytes:
            return
        size = ITEMSIZE[info.dtype]
        shape = (rows, *info.shape[1:]) if info.shape else ()
        first = row * info.strides[0] if info.shape else 0
        if columns is not None:
            shape, first = (rows, columns[1] - columns[0]), first + columns[0] * info.strides[1]
        start = info.start + first * size
        extent = 1 + sum((count - 1) * stride for count, stride in zip(shape, info.strides, strict=True))
        if info.strides == row_major(shape, info.strides):
            read_at(self._fd, start, out, self.path)
            return
        data = np.empty(extent * size, np.uint8)
        read_at(self._fd, start, data.data, self.path)
        kind = np.dtype(f"V{size}")
        strides = tuple(stride * size for stride in info.strides)
        picked = np.lib.stride_tricks.as_strided(data.view(kind), shape, strides, writeable=False)
        np.frombuffer(out, kind).reshape(shape)[...] = picked

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _tensors(span: Span) -> dict[str, BinTensor]:
    """Every tensor of a container, checked against the storage it lies in."""
    records = read_directory(span)
    order = records.get("byteorder")
    if order is not None and (order.size > 10 or span.read(data_start(span, order), order.size) != b"little"):
        raise Malformed("written on a big-endian machine")
    found = read_data_pickle(span, records, MAX_PICKLE_BYTES)
    if type(found) is not dict or not all(type(name) is str for name in found):
        raise Malformed("its pickle holds no dict of names")
    starts = {name: data_start(span, record) for name, record in records.items() if name.startswith("data/")}
    tensors = {}
    for name, value in found.items():
        try:
            dtype, key, offset, sizes, strides = tensor_of(value)
        except Malformed as error:
            raise Malformed(f"{shown(name)}: {error}") from None
        extent = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1
        record = records.get(f"data/{key}")
        if record is None or not is_count(math.prod(sizes)):
            raise Malformed(f"{shown(name)} has no data")
        if math.prod(sizes) and (extent * ITEMSIZE[dtype] > record.size):
            raise Malformed(f"{shown(name)} is larger than its data")
        tensors[name] = BinTensor(dtype, sizes, strides, starts[f"data/{key}"] + offset * ITEMSIZE[dtype])
    return tensors


class _LegacyFile:
    """A file from before torch 1.6. It is loaded whole for each tensor that is read from it, after another was."""

    _loaded: tuple[Path, dict[str, Any]] | None = None
    """The last file that was loaded, of all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = {
            name: BinTensor(NAME_OF_TORCH[str(tensor.dtype)], tuple(tensor.shape), tuple(tensor.stride()), 0)
            for name, tensor in self._load().items()
        }

    def _load(self) -> dict[str, Any]:
        if _LegacyFile._loaded is None or _LegacyFile._loaded[0] != self.path:
            _LegacyFile._loaded = None
            _LegacyFile._loaded = self.path, _load_legacy(self.path)
        return _LegacyFile._loaded[1]

    def read_into(self, name: str, row: int, rows: int, columns: tuple[int, int] | None, out: memoryview) -> None:
        """See `TensorSource`."""
        import torch

        tensor = self._load()[name]
        part = tensor[row : row + rows] if tensor.dim() else tensor
        part = part if columns is None else part[:, columns[0] : columns[1]]
        if out.nbytes:
            torch.frombuffer(out, dtype=tensor.dtype).view(part.shape).copy_(part)

    def close(self) -> None:
        """Nothing is open."""
        _LegacyFile._loaded = None


def _load_legacy(path: Path) -> dict[str, Any]:
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a parser of another project on a file of a stranger: it has no list of what it raises
        raise CheckpointError(
            f"{path}: no weights of PyTorch, truncated, or it wants to run code ({reason(error)}); download it again"
        ) from None
    good = isinstance(found, dict) and all(
        isinstance(name, str) and _is_plain(tensor) for name, tensor in found.items()
    )
    if not good:
        raise CheckpointError(f"{path}: holds something else than plain tensors by name; save the model's state dict")
    return found


def _is_plain(tensor: Any) -> bool:
    import torch

    return (
        isinstance(tensor, torch.Tensor)
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and tensor.device.type == "cpu"
        and str(tensor.dtype) in NAME_OF_TORCH
    )
