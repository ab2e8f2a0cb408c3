"""Reading rectangles of the tensors of a torch_dist checkpoint, without torch.

Opening a checkpoint reads `metadata.json`, which megatron-core writes last, and `.metadata`; it checks every place that
`.metadata` names against the size of its file. A tensor is then read chunk by chunk with `os.preadv`, straight from the
data record of the chunk's container into the caller's memory; the header of a container (see `container`) is parsed when
the chunk is first wanted. Beyond the output, memory is one block of 4 MiB.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from zlib_ng import zlib_ng as zlib

from checkpoints_conversion.files.dtypes import ITEMSIZE
from checkpoints_conversion.torch_dist.container import Span, StoredBlob, read_blob, read_data_pickle, read_directory
from checkpoints_conversion.torch_dist.layout import (
    Chunk,
    ChunkIndex,
    StoredObject,
    StoredTensor,
    parse_metadata,
    short,
)
from checkpoints_conversion.torch_dist.pickles import Malformed, read_pickle
from oprd_megatron.errors import CheckpointError

METADATA, COMMON, CONFIG = ".metadata", "common.pt", "metadata.json"
MAX_PICKLE_BYTES = 2**29
"""`.metadata` of the largest models is some tens of megabytes; what is read from a pickle takes many times its bytes."""
MAX_CONFIG_BYTES = 2**16
BLOCK_BYTES = 2**22
"""Rows of which only some columns are wanted, or wanted apart from each other, go through a block of this size."""
MAX_OPEN_FILES = 64
MAX_KNOWN_HEADERS = 4096

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class TorchDistReader:
    """One checkpoint. Use as a context manager, from one thread: it keeps files open.

    Attributes:
        directory: Where it lies.
        tensors: What is stored, by key.
        other_keys: Keys of what is no tensor (`_extra_state`), or one of a dtype that `dtypes` does not name.
    """

    tensors: dict[str, StoredTensor]
    other_keys: frozenset[str]

    def __init__(self, directory: str | Path) -> None:
        """Open and check everything but the tensors' own bytes.

        Raises:
            CheckpointError: no torch_dist checkpoint, unfinished, torn, or one of its files is missing or too short.
        """
        self.directory = Path(directory)
        self._files: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._blobs: OrderedDict[tuple[str, int], StoredBlob] = OrderedDict()
        self._indices: dict[str, ChunkIndex] = {}
        self._block: np.ndarray[Any, np.dtype[np.uint8]] | None = None
        _check_config(self.directory)
        with _named(self.directory / METADATA):
            root = read_pickle(_read_small(self.directory, METADATA, MAX_PICKLE_BYTES))
            self.tensors, objects = parse_metadata(root)
            self.other_keys = frozenset(objects)
        self._check_places(objects)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        while self._files:
            os.close(self._files.popitem()[1][0])

    def read_into(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...], out: memoryview) -> None:
        """Read a rectangle of a tensor.

        Args:
            key: One of `tensors`.
            offsets: Its first element, per dimension of the tensor's shape.
            sizes: Its extent, per dimension.
            out: Gets its bytes, row-major; writable, C-contiguous and of exactly that many bytes.

        Raises:
            CheckpointError: no such tensor or rectangle; the chunks overlap or leave a gap; a file is torn.
        """
        tensor = self._tensor(key)
        inside = len(offsets) == len(sizes) == len(tensor.shape) and all(
            first >= 0 and size >= 0 and first + size <= whole
            for first, size, whole in zip(offsets, sizes, tensor.shape, strict=True)
        )
        if not inside:
            raise CheckpointError(
                f"{self.directory}: {short(key)} has shape {list(tensor.shape)}, which has no part of {list(sizes)} at "
                f"{list(offsets)}; check that the checkpoint belongs to this model"
            )
        itemsize = ITEMSIZE[tensor.dtype]
        assert out.nbytes == math.prod(sizes) * itemsize, f"{out.nbytes} bytes for {sizes} of {tensor.dtype}"
        if 0 in sizes:
            return
        target = np.frombuffer(out, _UNSIGNED[itemsize]).reshape(1, *sizes)  # one dimension more: none has none
        for chunk in self._index(tensor).overlapping(offsets, sizes):
            blob = self._blob(tensor, chunk)
            low = [max(a, b) for a, b in zip(chunk.offsets, offsets, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(chunk.offsets, chunk.sizes, offsets, sizes, strict=True)]
            part = target[0:1, *(slice(a - o, b - o) for a, b, o in zip(low, high, offsets, strict=True))]
            inner = (0, *(a - o for a, o in zip(low, chunk.offsets, strict=True)))
            with _named(self.directory / chunk.file):
                self._copy(self._file(chunk.file)[0], blob.start, (1, *chunk.sizes), inner, part)

    def check_chunk(self, key: str, chunk: Chunk) -> bool:
        """Read a chunk's data and compare its crc32 with the one in the container's directory.

        Returns:
            False when the container was written without checksums (a setting of torch), so that nothing is known.

        Raises:
            CheckpointError: they differ, or the container is torn.
        """
        blob = self._blob(self._tensor(key), chunk)
        if not blob.record_crc and blob.record_size:
            return False
        fd = self._file(chunk.file)[0]
        crc = 0
        with _named(self.directory / chunk.file):
            for done in range(0, blob.record_size, BLOCK_BYTES):
                block = self._scratch(min(BLOCK_BYTES, blob.record_size - done))
                _read_exactly(fd, blob.record_start + done, block.data)
                crc = zlib.crc32(block.data, crc)
            if crc != blob.record_crc:
                raise Malformed(
                    f"the data of {short(key)} at {list(chunk.offsets)} has crc32 {crc:08x}, not {blob.record_crc:08x}"
                )
        return True

    def _tensor(self, key: str) -> StoredTensor:
        if key not in self.tensors:
            raise CheckpointError(f"{self.directory}: has no tensor {short(key)}; check that it belongs to this model")
        return self.tensors[key]

    def _index(self, tensor: StoredTensor) -> ChunkIndex:
        if tensor.key not in self._indices:
            with _named(self.directory / METADATA):
                self._indices[tensor.key] = ChunkIndex(tensor)
        return self._indices[tensor.key]

    def _blob(self, tensor: StoredTensor, chunk: Chunk) -> StoredBlob:
        """The header of a chunk's container, held against what `.metadata` says of the chunk."""
        place = chunk.file, chunk.start
        if place not in self._blobs:
            with _named(self.directory / chunk.file):
                blob = read_blob(Span(self._file(chunk.file)[0], chunk.start, chunk.length))
                if blob.dtype != tensor.dtype or not _same_shape(blob.sizes, chunk.sizes):
                    raise Malformed(
                        f"{METADATA} places {tensor.dtype} {list(chunk.sizes)} of {short(tensor.key)} at byte "
                        f"{chunk.start}, where {blob.dtype} {list(blob.sizes)} is"
                    )
            if len(self._blobs) >= MAX_KNOWN_HEADERS:
                self._blobs.popitem(last=False)
            self._blobs[place] = blob
        return self._blobs[place]

    def _file(self, name: str) -> tuple[int, int]:
        """Descriptor and size of a data file; the one opened first is closed when there are too many."""
        if name not in self._files:
            if len(self._files) >= MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1][0])
            with _named(self.directory / name if name.isprintable() else self.directory):
                self._files[name] = _open(self.directory, name)
        return self._files[name]

    def _check_places(self, objects: dict[str, StoredObject]) -> None:
        """Every file is there and as long as what lies in it; no byte is claimed twice over."""
        ends: defaultdict[str, int] = defaultdict(int)
        claimed: defaultdict[str, int] = defaultdict(int)
        places: list[Chunk | StoredObject] = [stored for stored in objects.values() if stored.length]
        places += (chunk for tensor in self.tensors.values() for chunk in tensor.chunks)
        for place in places:
            ends[place.file] = max(ends[place.file], place.start + place.length)
            claimed[place.file] += place.length
        try:
            for name in sorted(ends):
                size = self._file(name)[1]
                if max(ends[name], claimed[name]) > size:
                    raise CheckpointError(
                        f"{self.directory / name}: has {size} bytes, {METADATA} places {max(ends[name], claimed[name])} in "
                        "it; it is truncated, copy the checkpoint again"
                    )
        except BaseException:
            self.close()
            raise

    def _scratch(self, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        if self._block is None:
            self._block = np.empty(BLOCK_BYTES, np.uint8)
        return self._block[:size]

    def _copy(
        self, fd: int, at: int, sizes: tuple[int, ...], low: tuple[int, ...], part: np.ndarray[Any, np.dtype[Any]]
    ) -> None:
        """Fill `part` from a row-major array of `sizes` at byte `at` of a file, from its element `low` on."""
        row = math.prod(sizes[1:]) * part.itemsize
        at += low[0] * row
        whole_rows = part.shape[1:] == sizes[1:]
        if whole_rows and part.flags.c_contiguous:
            _read_exactly(fd, at, part.reshape(-1).view(np.uint8).data)
        elif row > BLOCK_BYTES or (len(sizes) > 2 and not whole_rows):
            for i in range(part.shape[0]):
                self._copy(fd, at + i * row, sizes[1:], low[1:], part[i])
        else:
            columns = tuple(slice(first, first + n) for first, n in zip(low[1:], part.shape[1:], strict=True))
            count = BLOCK_BYTES // row
            for first in range(0, part.shape[0], count):
                some = part[first : first + count]
                block = self._scratch(len(some) * row)
                _read_exactly(fd, at + first * row, block.data)
                some[...] = block.view(part.dtype).reshape(len(some), *sizes[1:])[:, *columns]


def read_common(directory: str | Path) -> dict[str, Any]:
    """`common.pt`: what is no tensor, such as `iteration`, `checkpoint_version` and `args`.

    Plain values come as they are; `args` and other objects as a `pickles.Record` whose attributes `vars` gives, tensors
    and enums as a record too (an enum's only argument is its value), dtypes by name ("BF16"). Nothing is executed.

    Raises:
        CheckpointError: missing, torn, or no dict.
    """
    with _named(Path(directory, COMMON)):
        fd, size = _open(Path(directory), COMMON)
        try:
            span = Span(fd, 0, size)
            found = read_data_pickle(span, read_directory(span), MAX_PICKLE_BYTES)
        finally:
            os.close(fd)
        if type(found) is not dict:
            raise Malformed("holds no dict")
    return found


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn what is wrong with a file into the error that names it."""
    try:
        yield
    except Malformed as error:
        advice = "" if "; " in str(error) else "; copy the checkpoint again or use an older one"
        raise CheckpointError(f"{path}: {error}{advice}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the checkpoint") from None


def _open(directory: Path, name: str) -> tuple[int, int]:
    """Descriptor and size of a regular file that lies in the directory, whatever links lead to it."""
    if "\0" in name or not name.isprintable():
        raise Malformed(f"names a data file {short(name)}")
    path = Path(os.path.realpath(directory / name))
    if not path.is_relative_to(os.path.realpath(directory)):
        raise Malformed("lies outside the checkpoint; copy the file into it")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise Malformed("is no regular file")
    return fd, status.st_size


def _read_small(directory: Path, name: str, limit: int) -> bytes:
    fd, size = _open(directory, name)
    try:
        if size > limit:
            raise Malformed(f"has {size} bytes, more than {limit}")
        return Span(fd, 0, size).read(0, size)
    finally:
        os.close(fd)


def _check_config(directory: Path) -> None:
    """`metadata.json` is there and names the format."""
    with _named(directory / CONFIG):
        if not (directory / CONFIG).exists():
            raise CheckpointError(
                f"{directory}: has no {CONFIG}, so it is no finished checkpoint; give an iter_ directory"
            )
        try:
            config = json.loads(_read_small(directory, CONFIG, MAX_CONFIG_BYTES))
        except (ValueError, RecursionError) as error:
            raise Malformed(str(error) if isinstance(error, Malformed) else "is no JSON") from None
        found = (config.get("sharded_backend"), config.get("sharded_backend_version")) if type(config) is dict else None
        if found != ("torch_dist", 1):
            raise Malformed("does not name the format torch_dist, version 1")


def _same_shape(blob: tuple[int, ...], chunk: tuple[int, ...]) -> bool:
    """Whether a blob has the chunk's sizes, with or without the leading 1s of prepended axes."""
    extra = len(chunk) - len(blob)
    return extra >= 0 and chunk[:extra] == (1,) * extra and chunk[extra:] == blob


def _read_exactly(fd: int, at: int, out: memoryview) -> None:
    done = 0
    while done < len(out):
        count = os.preadv(fd, [out[done:]], at + done)
        if not count:
            raise Malformed("became shorter while it was read")
        done += count
