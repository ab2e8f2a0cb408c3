"""Writing Hugging Face weight files from any source of tensors, in parallel and within a few MiB of memory.

Names, shapes and dtypes are known before a byte is copied: a file's header is written first, and its tensors then go to their
places. The index is made from what was written.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from zlib_ng import zlib_ng as zlib

from checkpoints_conversion.convert.blocks import BLOCK_BYTES, scratch
from checkpoints_conversion.convert.casting import cast
from checkpoints_conversion.convert.jobs import Records
from checkpoints_conversion.families.base import read_config
from checkpoints_conversion.files.dtypes import ITEMSIZE, TORCH_NAMES
from checkpoints_conversion.files.safetensors_file import SafetensorsFile, safetensors_header
from checkpoints_conversion.files.source import TensorSource
from checkpoints_conversion.reader import INDEX_FILE, SINGLE_FILE
from checkpoints_conversion.tokenizer import copy_companions
from oprd_megatron.errors import CheckpointError

SEGMENT_BYTES = 256 * 2**20
"""What one process writes at a time: consecutive tensors, at least one."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of a file; `start` is the position of its first byte there."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class PlannedFile:
    """One file: its header, and its tensors in segments."""

    name: str
    header: bytes
    segments: list[list[PlannedTensor]]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tensors(self) -> list[PlannedTensor]:
        return [tensor for segment in self.segments for tensor in segment]


def plan_hf_files(tensors: list[PlannedTensor], max_shard_bytes: int) -> list[PlannedFile]:
    """Deal tensors, in order, to files of at most `max_shard_bytes`; a larger tensor has a file of its own."""
    shards = list(pack(tensors, max_shard_bytes))
    files = []
    for number, shard in enumerate(shards):
        name = SINGLE_FILE if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        header, starts = safetensors_header([(tensor.name, tensor.dtype, tensor.shape) for tensor in shard])
        placed = [PlannedTensor(t.name, t.dtype, t.shape, start) for t, start in zip(shard, starts, strict=True)]
        files.append(PlannedFile(name, header, list(pack(placed, SEGMENT_BYTES))))
    return files


class Sized(Protocol):
    """Something that takes bytes in a file."""

    @property
    def nbytes(self) -> int: ...


Item = TypeVar("Item", bound=Sized)


def pack(items: Iterable[Item], limit: int) -> Iterator[list[Item]]:
    """Consecutive items, as many as are within `limit` bytes, at least one."""
    some: list[Item] = []
    size = 0
    for item in items:
        if some and size + item.nbytes > limit:
            yield some
            some, size = [], 0
        some.append(item)
        size += item.nbytes
    yield some


class HFFilesJob:
    """Writes the weight files of a Hugging Face directory."""

    def __init__(
        self, files: list[PlannedFile], open_source: Callable[[], TensorSource], identity: dict[str, Any]
    ) -> None:
        """
        Args:
            files: from `plan_hf_files`.
            open_source: gives the tensors, called once in each process; must be picklable.
            identity: see `Job`.
        """
        self.files, self.identity = files, identity
        self.file_names = [file.name for file in files]
        self._open_source = open_source
        self._source: TensorSource | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None}

    def num_segments(self, file: int) -> int:
        return len(self.files[file].segments)

    def nbytes(self, file: int) -> int:
        return self.files[file].nbytes

    def begin(self, file: int, path: Path) -> None:
        planned = self.files[file]
        path.unlink(missing_ok=True)
        with open(path, "wb") as part:
            part.write(planned.header)
            part.truncate(len(planned.header) + planned.nbytes)

    def write(self, file: int, segment: int, path: Path, advance: Callable[[int], None]) -> Records:
        if self._source is None:
            self._source = self._open_source()
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            return [self._write_tensor(fd, tensor, advance) for tensor in self.files[file].segments[segment]]
        finally:
            os.close(fd)

    def _write_tensor(self, fd: int, tensor: PlannedTensor, advance: Callable[[int], None]) -> dict[str, Any]:
        assert self._source is not None
        position, crc32 = tensor.start, 0
        for block in tensor_blocks(self._source, tensor.name, tensor.dtype):
            crc32 = zlib.crc32(block, crc32)
            done = 0
            while done < len(block):
                done += os.pwrite(fd, block[done:], position + done)
            position += len(block)
            advance(len(block))
        return {"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype, "crc32": crc32}

    def check(self, path: Path, records: Records, advance: Callable[[int], None]) -> None:
        check_hf_file(path, records, advance)


def tensor_blocks(source: TensorSource, name: str, dtype: str) -> Iterator[memoryview]:
    """A tensor's bytes in `dtype`, row-major, in blocks. A block is only valid until the next one."""
    shape, stored = source.shape(name), source.dtype(name)
    rows = shape[0] if shape else 1
    width = math.prod(shape[1:]) * ITEMSIZE[stored]
    rows_a_block = max(1, BLOCK_BYTES // max(1, width))
    buffer = scratch(width)
    for first in range(0, rows, rows_a_block):
        count = min(rows_a_block, rows - first)
        block = buffer[: count * width].data
        source.read_into(name, first, count, None, block)
        yield cast(block, stored, dtype)


def check_hf_file(path: Path, records: Records, advance: Callable[[int], None]) -> None:
    """Compare a weight file with its records: names, shapes, dtypes, checksums.

    Raises:
        CheckpointError: they differ; names the tensor.
    """
    file = SafetensorsFile(path)
    try:
        if [record["name"] for record in records] != list(file.tensors):
            raise CheckpointError(f"{path}: does not hold the tensors that conversion.json says; convert again")
        for record in records:
            info = file.tensors[record["name"]]
            if (list(info.shape), info.dtype) != (record["shape"], record["dtype"]):
                raise CheckpointError(f"{path}: {record['name']} is not what conversion.json says; convert again")
            crc32 = 0
            for start in range(info.start, info.start + info.nbytes, BLOCK_BYTES):
                block = file.read_bytes(start, min(BLOCK_BYTES, info.start + info.nbytes - start))
                crc32 = zlib.crc32(block, crc32)
                advance(len(block))
            if crc32 != record["crc32"]:
                raise CheckpointError(f"{path}: {record['name']} was changed after it was written; convert again")
    finally:
        file.close()


def write_index(directory: Path, files: dict[str, Records]) -> None:
    """`model.safetensors.index.json` of several files; none for a single one."""
    if len(files) == 1:
        return
    weight_map = {record["name"]: name for name, records in files.items() for record in records}
    total = sum(
        math.prod(record["shape"]) * ITEMSIZE[record["dtype"]] for records in files.values() for record in records
    )
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_companions(source: Path, directory: Path, dtypes: set[str]) -> None:
    """Copy config, tokenizer and templates; the config stays as it is, byte for byte, unless its dtype is not the weights'.

    Args:
        dtypes: of the weights beside it, in safetensors' spelling.
    """
    copy_companions(source, directory)
    if len(dtypes) != 1:
        return
    config, dtype = read_config(directory), TORCH_NAMES[dtypes.pop()]
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    if any(config.get(key) != dtype for key in keys):
        config.update(dict.fromkeys(keys, dtype))
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
