"""Writing a torch_dist checkpoint: chunks as a stream of blocks, then the tables that make it a checkpoint.

`ChunkWriter` writes the containers that `torch.save` would write (see `container`), byte for byte but for the fingerprint in
`.data/serialization_id`, without ever holding a chunk. What a container says about itself before the data is known
when a chunk begins; the crc32 follows the data, as torch has it too, in a descriptor and in the directory. So a file is
written from front to back.

`write_metadata` publishes the checkpoint: `.metadata`, then `metadata.json`, each under a temporary name first. A directory
without `metadata.json` is an unfinished save to megatron-core and to `TorchDistReader`.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from zlib_ng import zlib_ng as zlib

from checkpoints_conversion.files.dtypes import ITEMSIZE, TORCH_NAMES
from checkpoints_conversion.torch_dist import container
from checkpoints_conversion.torch_dist.container import STORAGES, row_major
from checkpoints_conversion.torch_dist.layout import ChunkIndex, StoredObject, StoredTensor
from checkpoints_conversion.torch_dist.reader import COMMON, CONFIG, METADATA
from oprd_megatron.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

PIECE_BYTES = 2**19
"""Blocks are summed and written piece by piece: what the checksum has just read is still in the cache, twice as fast."""
ALIGNMENT = 64
FLAGS_TEXT, FLAGS_DESCRIPTOR = 0x800, 0x8
ZIP64_VERSIONS = (0x031E, 45)
ZIP64_LIMIT = 0xFFFFFFFF
"""A size or a position from here on does not fit the 32-bit fields."""


class ChunkWriter:
    """One `.distcp` file, written front to back: `begin`, `write` until all bytes are there, `end`; then the next chunk."""

    def __init__(self, path: str | Path) -> None:
        """Create the file.

        Raises:
            CheckpointError: it exists, or cannot be created.
        """
        self.path = Path(path)
        self._position = 0
        with _named(self.path):
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def begin(self, dtype: str, sizes: tuple[int, ...]) -> None:
        """Start a chunk of `sizes`, prepended axes included (megatron-core stores [1, rows, columns])."""
        self._start = self._position
        self._crc = 0
        self._missing = math.prod(sizes) * ITEMSIZE[dtype]
        self._container = _Container()
        self._write(self._container.before_data(tensor_pickle(dtype, sizes), self._missing))

    def write(self, block: memoryview | bytes) -> None:
        """Append bytes of the chunk, row-major; any contiguous block will do."""
        view = memoryview(block).cast("B")
        self._missing -= len(view)
        assert self._missing >= 0, f"{-self._missing} bytes too many"
        for first in range(0, len(view), PIECE_BYTES):
            piece = view[first : first + PIECE_BYTES]
            self._crc = zlib.crc32(piece, self._crc)
            self._write(piece)

    def end(self) -> tuple[int, int, int]:
        """Finish the chunk.

        Returns:
            Position and length in the file of its container, and crc32 of its data.
        """
        assert self._missing == 0, f"{self._missing} bytes are missing"
        self._write(self._container.after_data(self._crc))
        return self._start, self._position - self._start, self._crc

    def write_object(self, saved: bytes) -> tuple[int, int]:
        """Append the container of an object that `torch.save` wrote; its position and length."""
        self._start = self._position
        self._write(saved)
        return self._start, self._position - self._start

    def close(self) -> None:
        """Let go of the file; the system puts it on the disk in its own time."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, data: memoryview | bytes) -> None:
        view = memoryview(data)
        with _named(self.path):
            while len(view):
                done = os.write(self._fd, view)
                self._position += done
                view = view[done:]


class _Container:
    """The bytes of a zip container around the data of one tensor, with the layout and the field values torch gives them."""

    def __init__(self) -> None:
        self._records: list[tuple[bytes, int, int, int]] = []
        self._position = 0

    def before_data(self, pickled: bytes, size: int) -> bytes:
        """Everything up to the first byte of a storage of `size` bytes."""
        self._size = size
        small = {
            "data.pkl": pickled,
            ".format_version": b"1",
            ".storage_alignment": str(ALIGNMENT).encode(),
            "byteorder": b"little",
        }
        head = b"".join(self._whole(name, data) for name, data in small.items())
        return head + self._header("data/0", size)

    def after_data(self, crc: int) -> bytes:
        """Everything from the last byte of the storage on."""
        self._position += self._size
        descriptor = self._descriptor("data/0", self._size, crc)
        fingerprint = f"{crc:040}".encode()
        tail = self._whole("version", b"3\n") + self._whole(".data/serialization_id", fingerprint)
        return descriptor + tail + self._directory()

    def _whole(self, name: str, data: bytes) -> bytes:
        header = self._header(name, len(data))
        self._position += len(data)
        return header + data + self._descriptor(name, len(data), zlib.crc32(data))

    def _header(self, name: str, size: int) -> bytes:
        """Local header, padded so that the data is aligned."""
        self._record_at = self._position
        encoded = f"archive/{name}".encode()
        wide = _zip64_extra(size, self._position)
        end = self._position + container.LOCAL_HEADER.size + len(encoded) + len(wide) + 4
        padding = -end % ALIGNMENT
        extra = wide + b"FB" + struct.pack("<H", padding) + b"Z" * padding
        fields = (0, _flags(size), 0, 0, 0, 0, 0, 0, len(encoded), len(extra))
        header = container.LOCAL_HEADER.pack(container.LOCAL_SIGNATURE, *fields) + encoded + extra
        self._position += len(header)
        return header

    def _descriptor(self, name: str, size: int, crc: int) -> bytes:
        """What follows the data of the record whose header was last, and note it for the directory."""
        self._records.append((f"archive/{name}".encode(), self._record_at, size, crc))
        sizes = "<IIQQ" if _zip64_extra(size, self._record_at) else "<IIII"
        descriptor = struct.pack(sizes, container.DESCRIPTOR_SIGNATURE, crc, size, size) if size else b""
        self._position += len(descriptor)
        return descriptor

    def _directory(self) -> bytes:
        entries = []
        for name, at, size, crc in self._records:
            extra = _zip64_extra(size, at)
            sizes = (_narrow(size), _narrow(size), len(name), len(extra))
            fields = (0, 0, _flags(size), 0, 0, 0, crc, *sizes, 0, 0, 0, 0, _narrow(at))
            entries.append(container.DIRECTORY_ENTRY.pack(container.DIRECTORY_SIGNATURE, *fields) + name + extra)
        directory = b"".join(entries)
        count, at = len(entries), self._position
        end64 = container.ZIP64_END.pack(
            container.ZIP64_END_SIGNATURE, 44, *ZIP64_VERSIONS, 0, 0, count, count, len(directory), at
        )
        pointer = container.ZIP64_POINTER.pack(container.ZIP64_POINTER_SIGNATURE, 0, at + len(directory), 1)
        end = container.END.pack(container.END_SIGNATURE, 0, 0, count, count, len(directory), _narrow(at), 0)
        return directory + end64 + pointer + end


def _narrow(value: int) -> int:
    """What a 32-bit field holds of a size or position."""
    return value if value < ZIP64_LIMIT else container.CLIPPED


def _zip64_extra(size: int, at: int) -> bytes:
    """The extra field with those of size, stored size and position that need 64 bits; empty when none does."""
    wide = [size, size] * (size >= ZIP64_LIMIT) + [at] * (at >= ZIP64_LIMIT)
    return struct.pack(f"<HH{len(wide)}Q", container.ZIP64_EXTRA, 8 * len(wide), *wide) if wide else b""


def _flags(size: int) -> int:
    return FLAGS_TEXT | FLAGS_DESCRIPTOR if size else FLAGS_TEXT


def tensor_pickle(dtype: str, sizes: tuple[int, ...]) -> bytes:
    """The pickle `torch.save` writes for a contiguous CPU tensor without gradient, whose storage is "0"."""
    memo = iter(range(256))

    def kept(pickled: bytes) -> bytes:
        return pickled + b"q" + bytes([next(memo)])

    def number(value: int) -> bytes:
        if value < 2**16:
            return struct.pack("<cB", b"K", value) if value < 2**8 else struct.pack("<cH", b"M", value)
        if value < 2**31:
            return struct.pack("<ci", b"J", value)
        length = value.bit_length() // 8 + 1
        return b"\x8a" + bytes([length]) + value.to_bytes(length, "little")

    def numbers(values: tuple[int, ...]) -> bytes:
        inside = b"".join(map(number, values))
        if not values:
            return b")"
        return kept(inside + (b"", b"\x85", b"\x86", b"\x87")[len(values)] if len(values) < 4 else b"(" + inside + b"t")

    def text(value: str) -> bytes:
        return kept(b"X" + struct.pack("<I", len(value)) + value.encode())

    def name(module: str, attribute: str) -> bytes:
        return kept(f"c{module}\n{attribute}\n".encode())

    rebuild = b"\x80\x02" + name("torch._utils", "_rebuild_tensor_v2")
    storage = text("storage") + name("torch", STORAGES[dtype]) + text("0") + text("cpu") + number(math.prod(sizes))
    tensor = b"((" + kept(storage + b"t") + b"Q" + number(0) + numbers(sizes) + numbers(row_major(sizes))
    hooks = b"\x89" + kept(name("collections", "OrderedDict") + b")R")
    return kept(kept(rebuild + tensor + hooks + b"t") + b"R") + b"."


def write_metadata(
    directory: str | Path, tensors: Iterable[StoredTensor], objects: Iterable[StoredObject] = ()
) -> None:
    """Make a directory of written chunks a checkpoint. Imports torch: `.metadata` is a pickle of its classes.

    Args:
        directory: Holds the files that the chunks name, closed.
        tensors: Every tensor, with the places that `ChunkWriter.end` returned.
        objects: What `ChunkWriter.write_object` wrote; keys as megatron-core's `ShardedObject.unique_key` has them.

    Raises:
        CheckpointError: the files cannot be written.
    """
    import pickle

    metadata = _metadata(tuple(tensors), tuple(objects))
    config = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    _publish(Path(directory, METADATA), lambda file: pickle.dump(metadata, file))
    _publish(Path(directory, CONFIG), lambda file: file.write(json.dumps(config).encode()))


def write_common(directory: str | Path, common: dict[str, Any]) -> None:
    """Write `common.pt` with `torch.save`; megatron-core wants one, `{}` will do.

    Raises:
        CheckpointError: it cannot be written.
    """
    import torch

    _publish(Path(directory, COMMON), lambda file: torch.save(common, file))


def _metadata(tensors: tuple[StoredTensor, ...], objects: tuple[StoredObject, ...]) -> Metadata:
    import torch
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    entries: dict[str, Any] = {}
    places: dict[dcp.MetadataIndex, _StorageInfo] = {}
    for tensor in tensors:
        ChunkIndex(tensor)  # chunks that do not tile their tensor are a defect of the caller
        properties = dcp.TensorProperties(dtype=getattr(torch, TORCH_NAMES[tensor.dtype]))
        chunks = [dcp.ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in tensor.chunks]
        entries[tensor.key] = dcp.TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        for number, chunk in enumerate(tensor.chunks):
            index = dcp.MetadataIndex(tensor.key, chunk.offsets, number)
            places[index] = _StorageInfo(chunk.file, chunk.start, chunk.length)
    for stored in objects:
        entries[stored.key] = dcp.BytesStorageMetadata()
        places[dcp.MetadataIndex(stored.key)] = _StorageInfo(stored.file, stored.start, stored.length)
    return dcp.Metadata(state_dict_metadata=entries, storage_data=places)


def _publish(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file under a temporary name, put it on the disk, then give it its name."""
    staging = path.with_name(path.name + ".tmp")
    with _named(path):
        with open(staging, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror}); make room and continue with --resume, or use another directory"
        ) from None
