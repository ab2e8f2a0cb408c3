"""The format that weights travel in: buckets, each a safetensors file, and a manifest.

A bucket is written under a temporary name and renamed when it is whole. Its entries (name, shape, dtype, crc32 of every tensor)
travel beside it, in the request that asks for it to be loaded, so that a bucket which is torn, stale or altered is found
before its tensors reach a model. The manifest is a JSON file with the version and the entries of all buckets, written last
and renamed: where it is, the update is whole.

The header of a safetensors file comes first and lists the tensors, which are not known before the last one has come. Room for
it is left at the start, and what it does not need is blank, which the format allows. So a bucket is never in memory as a whole.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from oprd_megatron.errors import WeightSyncError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
"""Names of safetensors for what a weight can be."""

DATA_START = 2**20
"""Offset of a bucket's first tensor: 8 bytes of length and the header."""

MANIFEST = "manifest.json"

BACKEND = "oprd_buckets"
"""Name of the weight transfer backend that reads this format."""


@dataclass(frozen=True)
class Entry:
    """One tensor of an update."""

    name: str
    """Hugging Face name."""
    shape: tuple[int, ...]
    dtype: str
    """Name of safetensors: F32, BF16."""
    crc32: int
    """Of the tensor's bytes, row by row."""
    bucket: str
    """File name of the bucket that holds it."""

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Entry:
        return cls(**{**fields, "shape": tuple(fields["shape"])})


class BucketWriter:
    """Writes one bucket, tensor by tensor.

    Args:
        path: the bucket's final name; until `close` it is written to a neighbour that ends in .tmp.
        capacity: bytes of tensors it may hold. A single larger tensor has a bucket of its own.

    Attributes:
        entries: what it holds so far.
    """

    def __init__(self, path: Path, capacity: int) -> None:
        self.path, self.capacity = path, capacity
        self.entries: list[Entry] = []
        self._staging = path.with_name(path.name + ".tmp")
        self._file = self._staging.open("wb")
        self._file.seek(DATA_START)
        self._header: dict[str, dict[str, Any]] = {}
        self._header_bytes, self._size = 2, 0

    def fits(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether the tensor can still be added. An empty bucket takes anything."""
        if not self.entries:
            return True
        full = self._size + tensor.nbytes > self.capacity
        header_full = self._header_bytes + _header_bytes(name, tensor) > DATA_START - 8
        return not (full or header_full or self._size % tensor.element_size())

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor of any device."""
        host = tensor.detach().contiguous().cpu()
        data = memoryview(_bytes_of(host))
        start, self._size = self._size, self._size + len(data)
        dtype = DTYPES[tensor.dtype]
        self._header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, self._size]}
        self._header_bytes += _header_bytes(name, tensor)
        self._file.write(data)
        self.entries.append(Entry(name, tuple(tensor.shape), dtype, zlib.crc32(data), self.path.name))

    def close(self) -> None:
        """Write the header and give the file its name."""
        self._file.seek(0)
        header = json.dumps(self._header).encode().ljust(DATA_START - 8)
        self._file.write(len(header).to_bytes(8, "little") + header)
        self._file.close()
        self._staging.rename(self.path)

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self._staging.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def read_bucket(path: Path, entries: Sequence[Entry]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a bucket, in the order of `entries`, each a copy that was checked: it has the announced bytes.

    Raises:
        WeightSyncError: the file is missing or torn, holds other names, or a tensor differs in shape, dtype or checksum.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            _check_names(path, set(file.keys()), entries)
            for entry in entries:
                tensor = file.get_tensor(entry.name).clone()
                if tuple(tensor.shape) != entry.shape or DTYPES.get(tensor.dtype) != entry.dtype:
                    raise WeightSyncError(
                        f"{path}: {entry.name!r} is {DTYPES.get(tensor.dtype)} {list(tensor.shape)}, announced was "
                        f"{entry.dtype} {list(entry.shape)}"
                    )
                if (found := zlib.crc32(_bytes_of(tensor))) != entry.crc32:
                    raise WeightSyncError(
                        f"{path}: the bytes of {entry.name!r} are not those that were sent (crc32 {found:08x}, announced "
                        f"{entry.crc32:08x})"
                    )
                yield entry.name, tensor
    except (OSError, SafetensorError) as error:
        raise WeightSyncError(f"{path}: the bucket cannot be read ({error}); it is missing or torn") from None


def write_manifest(folder: Path, version: int, entries: Sequence[Entry]) -> Path:
    """Mark an update as whole. Returns the manifest's path."""
    path = folder / MANIFEST
    staging = path.with_name(MANIFEST + ".tmp")
    staging.write_text(json.dumps({"version": version, "tensors": [asdict(entry) for entry in entries]}))
    staging.rename(path)
    return path


def read_manifest(path: Path) -> tuple[int, list[Entry]]:
    """Version and entries.

    Raises:
        WeightSyncError: it is missing or torn.
    """
    try:
        fields = json.loads(path.read_text())
        return fields["version"], [Entry.from_json(entry) for entry in fields["tensors"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightSyncError(f"{path}: not a manifest of a whole update ({error})") from None


class Ledger:
    """What one update has brought so far.

    Args:
        version: of the weights on their way.

    Attributes:
        received: crc32 of each tensor, by name.
        is_whole: whether `settle` has found nothing missing.
    """

    def __init__(self, version: int) -> None:
        self.version = version
        self.received: dict[str, int] = {}
        self.is_whole = False

    def read(self, path: Path, entries: Sequence[Entry]) -> Iterator[tuple[str, torch.Tensor]]:
        """`read_bucket`, written down.

        Raises:
            WeightSyncError: as `read_bucket`, or a tensor came before.
        """
        for entry in entries:
            if entry.name in self.received:
                raise WeightSyncError(f"{path}: {entry.name!r} was sent twice in update {self.version}")
            self.received[entry.name] = entry.crc32
        return read_bucket(path, entries)

    def noted(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors as they come from this process's memory, written down.

        Raises:
            WeightSyncError: a tensor came before.
        """
        for name, tensor in tensors:
            if name in self.received:
                raise WeightSyncError(f"{name!r} was sent twice in update {self.version}")
            self.received[name] = zlib.crc32(_bytes_of(tensor.detach().contiguous().cpu()))
            yield name, tensor

    def settle(self, manifest: Path) -> None:
        """Compare with the manifest.

        Raises:
            WeightSyncError: it is of another version, or names are missing, unexpected or of other bytes.
        """
        version, entries = read_manifest(manifest)
        if version != self.version:
            raise WeightSyncError(f"{manifest}: is of version {version}, the update is of version {self.version}")
        sent = {entry.name: entry.crc32 for entry in entries}
        if len(sent) != len(entries):
            raise WeightSyncError(f"{manifest}: a tensor is listed twice")
        for what, names in (
            ("missing", sent.keys() - self.received.keys()),
            ("unexpected", self.received.keys() - sent.keys()),
            (
                "of other bytes than announced",
                {name for name, crc32 in self.received.items() if sent.get(name) != crc32},
            ),
        ):
            if names:
                raise WeightSyncError(
                    f"{manifest}: update {version}: {len(names)} of {len(sent)} tensors {what}, the first is {min(names)!r}"
                )
        self.is_whole = True


def _check_names(path: Path, found: set[str], entries: Sequence[Entry]) -> None:
    announced = {entry.name for entry in entries}
    if len(announced) != len(entries):
        raise WeightSyncError(f"{path}: a tensor is announced twice")
    if missing := announced - found:
        raise WeightSyncError(f"{path}: {min(missing)!r} was announced and is not in the bucket")
    if unexpected := found - announced:
        raise WeightSyncError(f"{path}: {min(unexpected)!r} is in the bucket and was not announced")


def _bytes_of(tensor: torch.Tensor) -> Any:
    """A contiguous CPU tensor's memory, as uint8."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _header_bytes(name: str, tensor: torch.Tensor) -> int:
    """A bound on what one tensor takes of the header."""
    return 6 * len(name.encode()) + 24 * tensor.ndim + 120
