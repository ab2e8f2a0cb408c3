"""The zip container in which `torch.save` keeps one object: where its records are, and what tensor they hold.

    local header, data.pkl            the object as a pickle; a tensor is a call of `_rebuild_tensor_v2` with
    local header, byteorder, ...      (storage "0", offset in it, sizes, strides)
    local header, data/0              the bytes of storage "0", stored as they are, aligned to 64
    local header, version, ...
    directory: name, size, crc32 and header position of every record
    end of the directory: its position (64-bit form, a pointer to that, 32-bit form)

Positions count from the start of the container, which may lie anywhere in a file. Everything that is read here is small and
checked against the container's length before it is believed; the tensor's bytes are left where they are.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from typing import Any, TypeGuard

from checkpoints_conversion.files.dtypes import ITEMSIZE
from checkpoints_conversion.torch_dist.pickles import PERSISTENT, Global, Malformed, Record, read_pickle

STORAGES = {
    "F64": "DoubleStorage",
    "F32": "FloatStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "I64": "LongStorage",
    "I32": "IntStorage",
    "I16": "ShortStorage",
    "I8": "CharStorage",
    "U8": "ByteStorage",
    "BOOL": "BoolStorage",
}
"""Class of the storage of each dtype in a pickle that `torch.save` writes."""
_DTYPE_OF_STORAGE = {f"torch.{storage}": dtype for dtype, storage in STORAGES.items()}

LOCAL_HEADER = struct.Struct("<IHHHHHIIIHH")
DIRECTORY_ENTRY = struct.Struct("<IHHHHHHIIIHHHHHII")
ZIP64_END = struct.Struct("<IQHHIIQQQQ")
ZIP64_POINTER = struct.Struct("<IIQI")
END = struct.Struct("<IHHHHIIH")
LOCAL_SIGNATURE, DIRECTORY_SIGNATURE, DESCRIPTOR_SIGNATURE = 0x04034B50, 0x02014B50, 0x08074B50
ZIP64_END_SIGNATURE, ZIP64_POINTER_SIGNATURE, END_SIGNATURE = 0x06064B50, 0x07064B50, 0x06054B50
ZIP64_EXTRA = 1
CLIPPED = 0xFFFFFFFF
"""A 32-bit field with this value stands in the zip64 extra instead."""

MAX_DIRECTORY_BYTES = 2**24
MAX_TENSOR_PICKLE_BYTES = 2**16
MAX_DIMS = 16
MAX_COUNT = 2**62
"""No size, offset or length reaches this; products of what passed are checked too."""


@dataclass(frozen=True)
class Span:
    """`length` bytes of an open file from `start` on."""

    fd: int
    start: int
    length: int

    def read(self, at: int, length: int) -> bytes:
        """`length` bytes from `at`, counted from the start of the span."""
        if at < 0 or length < 0 or at + length > self.length:
            raise Malformed(f"bytes {at} to {at + length} of a container of {self.length}")
        data = os.pread(self.fd, length, self.start + at)
        if len(data) != length:
            raise Malformed("truncated")
        return data


@dataclass(frozen=True)
class ZipRecord:
    """One record: where its local header begins and what the directory says of its data."""

    header: int
    size: int
    crc: int


@dataclass(frozen=True)
class StoredBlob:
    """The tensor in a container. `start` is the position of its first byte in the file; data is row-major.

    `record_start`, `record_size` and `record_crc` (crc32, 0: not recorded) are those of the whole storage.
    """

    dtype: str
    sizes: tuple[int, ...]
    start: int
    record_start: int
    record_size: int
    record_crc: int


def is_count(value: Any) -> TypeGuard[int]:
    """Whether something read from a file is a size, an offset or a length."""
    return type(value) is int and 0 <= value < MAX_COUNT


def read_directory(span: Span) -> dict[str, ZipRecord]:
    """The records of a container by name, without the folder in which they all lie ("data.pkl", "data/0").

    Raises:
        Malformed: no zip that torch writes, torn, or compressed.
    """
    count, size, at = _find_directory(span)
    if size > MAX_DIRECTORY_BYTES or at + size > span.length:
        raise Malformed(f"a zip directory of {size} bytes at {at}")
    raw = span.read(at, size)
    records: dict[str, ZipRecord] = {}
    position = 0
    for _ in range(count):
        name, record, position = _directory_entry(raw, position)
        if record.header + record.size > span.length:
            raise Malformed(f"record {name[:100]!r} goes beyond the end of its container")
        if records.setdefault(name, record) is not record:
            raise Malformed(f"two records {name[:100]!r}")
    return records


def _find_directory(span: Span) -> tuple[int, int, int]:
    """Number of entries, bytes and position of the directory."""
    if span.length < END.size:
        raise Malformed(f"{span.length} bytes are too few for a container")
    end_at = span.length - END.size
    signature, _, _, _, count, size, at, comment = END.unpack(span.read(end_at, END.size))
    if signature != END_SIGNATURE or comment:
        raise Malformed("no zip container written by torch.save, or its end is missing")
    if end_at >= ZIP64_POINTER.size:
        pointer = ZIP64_POINTER.unpack(span.read(end_at - ZIP64_POINTER.size, ZIP64_POINTER.size))
        if pointer[0] == ZIP64_POINTER_SIGNATURE:
            fields = ZIP64_END.unpack(span.read(pointer[2], ZIP64_END.size))
            if fields[0] != ZIP64_END_SIGNATURE:
                raise Malformed("a zip64 end of directory that is none")
            count, size, at = fields[7:10]
    return count, size, at


def _directory_entry(raw: bytes, at: int) -> tuple[str, ZipRecord, int]:
    """One entry of the directory: name, record, and where the next one begins."""
    if at + DIRECTORY_ENTRY.size > len(raw):
        raise Malformed("a zip directory that ends early")
    fields = DIRECTORY_ENTRY.unpack_from(raw, at)
    signature, flags, method, crc, stored, size = (fields[i] for i in (0, 3, 4, 7, 8, 9))
    name_length, extra_length, comment_length = fields[10:13]
    extra_at = at + DIRECTORY_ENTRY.size + name_length
    stop = extra_at + extra_length + comment_length
    if signature != DIRECTORY_SIGNATURE or stop > len(raw):
        raise Malformed("a zip directory that is torn")
    wide = _zip64_values(raw[extra_at : extra_at + extra_length])
    size, stored, header = (wide.pop(0) if n == CLIPPED and wide else n for n in (size, stored, fields[16]))
    try:
        name = raw[at + DIRECTORY_ENTRY.size : extra_at].decode()
    except UnicodeDecodeError:
        raise Malformed("a record whose name is no text") from None
    if method or flags & 1 or size != stored:
        raise Malformed(f"record {name[:100]!r} is compressed or encrypted, which torch.save never does")
    return name.partition("/")[2], ZipRecord(header, size, crc), stop


def _zip64_values(extra: bytes) -> list[int]:
    """The 64-bit numbers of a zip64 extra field, in the order size, stored size, position of the header."""
    while len(extra) >= 4:
        tag, length = struct.unpack_from("<HH", extra)
        if tag == ZIP64_EXTRA:
            body = extra[4 : 4 + length // 8 * 8]
            return [value for (value,) in struct.iter_unpack("<Q", body[: len(body) // 8 * 8])]
        extra = extra[4 + length :]
    return []


def data_start(span: Span, record: ZipRecord) -> int:
    """Where a record's data begins, counted from the start of the container."""
    fields = LOCAL_HEADER.unpack(span.read(record.header, LOCAL_HEADER.size))
    at: int = record.header + LOCAL_HEADER.size + fields[9] + fields[10]
    if fields[0] != LOCAL_SIGNATURE or at + record.size > span.length:
        raise Malformed("a record's header is torn")
    return at


def read_data_pickle(span: Span, records: dict[str, ZipRecord], limit: int) -> Any:
    """The object of a container as plain values and inert records (see `pickles`); storages are named, not read."""
    if "data.pkl" not in records:
        raise Malformed("a zip without data.pkl, not written by torch.save")
    record = records["data.pkl"]
    if record.size > limit:
        raise Malformed(f"a pickle of {record.size} bytes, more than {limit}")
    return read_pickle(span.read(data_start(span, record), record.size))


def read_blob(span: Span) -> StoredBlob:
    """Find the one tensor of a container.

    Raises:
        Malformed: it holds something else, a tensor that is not row-major, or data beyond its storage.
    """
    records = read_directory(span)
    dtype, key, offset, sizes, strides = tensor_of(read_data_pickle(span, records, MAX_TENSOR_PICKLE_BYTES))
    order = records.get("byteorder")
    if order is not None and (order.size > 10 or span.read(data_start(span, order), order.size) != b"little"):
        raise Malformed("written on a big-endian machine; save it again on a little-endian one")
    record = records.get(f"data/{key}")
    if record is None:
        raise Malformed(f"no data for storage {key[:100]!r}")
    numel = math.prod(sizes)
    if (offset + numel) * ITEMSIZE[dtype] > record.size:
        raise Malformed(f"a tensor of {dtype} {list(sizes)}, but only {record.size} bytes of data")
    if numel and strides != row_major(sizes, strides):
        raise Malformed(f"a tensor with strides {list(strides)}, not row-major; save it contiguous")
    start = span.start + data_start(span, record)
    return StoredBlob(dtype, sizes, start + offset * ITEMSIZE[dtype], start, record.size, record.crc)


def row_major(sizes: tuple[int, ...], given: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous tensor; where the size is 1, which any stride fits, those in `given`."""
    strides: list[int] = []
    step = 1
    for dim in reversed(range(len(sizes))):
        strides.append(given[dim] if given and sizes[dim] == 1 else step)
        step *= max(sizes[dim], 1)
    return tuple(reversed(strides))


def tensor_of(found: Any) -> tuple[str, str, int, tuple[int, ...], tuple[int, ...]]:
    """dtype, storage key, offset in the storage, sizes and strides of a pickled tensor."""
    if type(found) is Record and found.name == "torch._utils._rebuild_parameter" and found.args:
        found = found.args[0]
    if type(found) is not Record or found.name != "torch._utils._rebuild_tensor_v2" or len(found.args) < 4:
        raise Malformed("a container that holds no plain tensor")
    storage, offset, sizes, strides = found.args[:4]
    if type(storage) is not Record or storage.name != PERSISTENT or len(storage.args) != 5:
        raise Malformed("a tensor without a storage")
    kind, key = storage.args[1:3]
    dtype = _DTYPE_OF_STORAGE.get(kind.name) if type(kind) is Global else None
    if dtype is None or type(key) is not str:
        raise Malformed("a tensor of an unknown storage")
    if not (type(sizes) is tuple and type(strides) is tuple and len(sizes) == len(strides) <= MAX_DIMS):
        raise Malformed("a tensor without sizes")
    if not all(map(is_count, (offset, *sizes, *strides))) or not is_count(offset + math.prod(sizes)):
        raise Malformed("a tensor with impossible sizes")
    return dtype, key, offset, sizes, strides
