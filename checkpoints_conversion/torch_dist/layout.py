"""What `.metadata` says: which tensors there are, into which rectangles each is cut, and where those lie.

`.metadata` is a pickle of `torch.distributed.checkpoint.metadata.Metadata`, of which two tables matter:

    state_dict_metadata   {key: TensorStorageMetadata(properties.dtype, size, [chunk(offsets, sizes), ...])}
                          or BytesStorageMetadata, for pickled objects such as `_extra_state`
    storage_data          {MetadataIndex(key, offsets): _StorageInfo(relative_path, offset, length)}

megatron-core keeps the layers of a model in one tensor with a prepended axis: `decoder.layers.mlp.linear_fc1.weight` is
[80, 57344, 8192], and the blob of a chunk has the leading 1 too ([1, 7168, 8192]). The chunks of a tensor tile it: they
do not overlap, and together they are the whole. `ChunkIndex` holds them to that, so what is read is never half there.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

from checkpoints_conversion.files.dtypes import ITEMSIZE
from checkpoints_conversion.torch_dist.container import MAX_DIMS, is_count
from checkpoints_conversion.torch_dist.pickles import Malformed, Record

_MODULE = "torch.distributed.checkpoint.metadata."


@dataclass(frozen=True)
class Chunk:
    """One stored rectangle of a tensor.

    Attributes:
        offsets: Its first element in the tensor, per dimension.
        sizes: Its extent, per dimension.
        file: Name of the `.distcp` file in the directory.
        start: First byte of its zip container in the file.
        length: Bytes of the container.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint. `shape` is the global one, prepended axes included; `dtype` as safetensors spells it."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class StoredObject:
    """A pickled object that is no tensor, in a container of its own."""

    key: str
    file: str
    start: int
    length: int


def parse_metadata(root: Any) -> tuple[dict[str, StoredTensor], dict[str, StoredObject]]:
    """Tensors by key, and everything else (objects, tensors of dtypes this project does not know) by key.

    Raises:
        Malformed: the tables contradict each other or hold what cannot be.
    """
    root = _fields(root, "Metadata")
    entries, storage = root.get("state_dict_metadata"), root.get("storage_data")
    if type(entries) is not dict or type(storage) is not dict:
        raise Malformed("no tables of tensors")
    places = dict(_place(index, info) for index, info in storage.items())
    tensors: dict[str, StoredTensor] = {}
    objects: dict[str, StoredObject] = {}
    for key, entry in entries.items():
        if type(key) is not str:
            raise Malformed("a key that is no text")
        dtype = _dtype(entry) if _is(entry, "TensorStorageMetadata") else None
        if dtype is not None and dtype in ITEMSIZE:
            tensors[key] = _tensor(key, dtype, _fields(entry, "TensorStorageMetadata"), places)
        else:
            objects[key] = StoredObject(key, *places.get((key, None), ("", 0, 0)))
    return tensors, objects


def _is(value: Any, name: str) -> bool:
    return type(value) is Record and value.name == _MODULE + name


def _fields(value: Any, name: str) -> dict[str, Any]:
    """The attributes of a record of one of the classes that `.metadata` is made of."""
    if not _is(value, name):
        raise Malformed(f"no {name} where there should be one")
    fields: dict[str, Any] = value.__dict__
    return fields


def _place(index: Any, info: Any) -> tuple[tuple[str, tuple[int, ...] | None], tuple[str, int, int]]:
    """((key, offsets), (file, start, length)) of one row of storage_data."""
    row = _fields(index, "MetadataIndex")
    key, offsets = row.get("fqn"), row.get("offset")
    if type(key) is not str or not (offsets is None or _are_counts(offsets)):
        raise Malformed("a row of storage_data without a key")
    if type(info) is not Record or not info.name.endswith("._StorageInfo"):
        raise Malformed(f"no place of a file for {short(key)}")
    file, start, length = (vars(info).get(name) for name in ("relative_path", "offset", "length"))
    if type(file) is not str or not is_count(start) or not is_count(length):
        raise Malformed(f"an impossible place for {short(key)}")
    if vars(info).get("transform_descriptors"):
        raise Malformed(f"{short(key)} is stored through a transform (compression or encryption); save it without")
    return (key, offsets), (file, start, length)


def _dtype(entry: Record) -> str | None:
    """The dtype of a TensorStorageMetadata; None when it is not one of ours."""
    properties: Any = vars(entry).get("properties")
    _fields(properties, "TensorProperties")
    state = properties.state
    dtype = state[0] if type(state) is tuple and state else None
    return dtype if type(dtype) is str else None


def _tensor(
    key: str, dtype: str, fields: dict[str, Any], places: dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]]
) -> StoredTensor:
    shape, entries = fields.get("size"), fields.get("chunks")
    if not _are_counts(shape) or type(entries) is not list:
        raise Malformed(f"{short(key)} has no shape")
    chunks = []
    for entry in entries:
        rectangle = _fields(entry, "ChunkStorageMetadata")
        offsets, sizes = rectangle.get("offsets"), rectangle.get("sizes")
        if not _are_counts(offsets) or not _are_counts(sizes) or not len(offsets) == len(sizes) == len(shape):
            raise Malformed(f"{short(key)} has a chunk without sizes")
        if any(first + size > whole for first, size, whole in zip(offsets, sizes, shape, strict=True)):
            raise Malformed(f"a chunk of {short(key)} at {list(offsets)} goes beyond its shape {list(shape)}")
        if (key, offsets) not in places:
            raise Malformed(f"no file holds the chunk of {short(key)} at {list(offsets)}")
        chunk = Chunk(offsets, sizes, *places[key, offsets])
        if math.prod(sizes) * ITEMSIZE[dtype] > chunk.length:
            raise Malformed(f"the chunk of {short(key)} at {list(offsets)} is larger than its place")
        chunks.append(chunk)
    tensor = StoredTensor(key, shape, dtype, tuple(chunks))
    _check_volume(tensor)
    return tensor


def _check_volume(tensor: StoredTensor) -> None:
    if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.shape):
        raise Malformed(f"the chunks of {short(tensor.key)} do not add up to its shape {list(tensor.shape)}")


def _are_counts(value: Any) -> TypeGuard[tuple[int, ...]]:
    return type(value) is tuple and len(value) <= MAX_DIMS and all(map(is_count, value))


def short(text: str) -> str:
    """A name from a file, fit for a message of one line."""
    return repr(text) if len(text) <= 120 else repr(text[:117]) + "..."


class ChunkIndex:
    """The chunks of one tensor, found by rectangle in a time that does not depend on how many there are elsewhere.

    They are sorted along the dimension that is cut most often, for megatron-core the prepended axis of layers.
    """

    def __init__(self, tensor: StoredTensor) -> None:
        """Sort, and check that the chunks tile the tensor.

        Raises:
            Malformed: two chunks overlap, or a part of the tensor is in none.
        """
        chunks = [chunk for chunk in tensor.chunks if 0 not in chunk.sizes]
        rank = len(tensor.shape)
        self._dim = max(range(rank), key=lambda dim: len({c.offsets[dim] for c in chunks}), default=None)
        self._chunks = sorted(chunks, key=lambda chunk: chunk.offsets)
        if self._dim is not None:
            dim = self._dim
            self._chunks.sort(key=lambda chunk: chunk.offsets[dim])
            self._starts = [chunk.offsets[dim] for chunk in self._chunks]
            self._reach = max((chunk.sizes[dim] for chunk in chunks), default=0)
        self._check(tensor)

    def overlapping(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[Chunk]:
        """Chunks that share an element with the rectangle, none of whose sizes is 0."""
        some = self._chunks
        if self._dim is not None:
            first, last = offsets[self._dim], offsets[self._dim] + sizes[self._dim]
            some = some[bisect_right(self._starts, first - self._reach) : bisect_left(self._starts, last)]
        for chunk in some:
            if _overlap(chunk.offsets, chunk.sizes, offsets, sizes):
                yield chunk

    def _check(self, tensor: StoredTensor) -> None:
        """Disjoint chunks inside the shape whose volumes add up to it leave nothing out."""
        _check_volume(tensor)
        dim = self._dim
        active: list[Chunk] = []
        for chunk in self._chunks:
            if dim is not None:
                active = [other for other in active if other.offsets[dim] + other.sizes[dim] > chunk.offsets[dim]]
            if any(_overlap(chunk.offsets, chunk.sizes, other.offsets, other.sizes) for other in active):
                raise Malformed(f"two chunks of {short(tensor.key)} overlap at {list(chunk.offsets)}")
            active.append(chunk)


def _overlap(a: tuple[int, ...], a_sizes: tuple[int, ...], b: tuple[int, ...], b_sizes: tuple[int, ...]) -> bool:
    return all(
        first < other + other_size and other < first + size
        for first, size, other, other_size in zip(a, a_sizes, b, b_sizes, strict=True)
    )
