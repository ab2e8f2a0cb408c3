"""Weights on their way from a live sharded model to whoever holds them under Hugging Face names, and back.

    stream_hf_weights(..)      (name, tensor), whole, in the order of the table          weights.py
      in_buckets(..)           the same in buckets of bounded size, each one buffer that can be sent as it is
        Manifest.add(..)       what was sent: names, shapes, dtypes, checksums
    check_stream(..)           the receiver's side: in order, complete, unchanged
      load_hf_tensors(..)      into a live sharded model                                 weights.py

A checksum is two sums of the tensor's bits, read as integers, modulo 2**64: all of them, and row by row, each row times its
number, so that neither a changed number nor two swapped rows pass. It is the same on any device and needs no copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from checkpoints_conversion.files.dtypes import SAFETENSORS_NAMES
from oprd_megatron.errors import WeightSyncError

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MASK = 2**64 - 1


@dataclass(frozen=True)
class TensorRecord:
    """What one tensor is."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """In safetensors' spelling."""
    checksum: str
    """32 hexadecimal digits."""


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel together. They lie one after the other in `buffer`, and are only valid until the next bucket."""

    tensors: list[tuple[str, Tensor]]
    buffer: Tensor
    """uint8, on the tensors' device."""


@dataclass
class Manifest:
    """What was sent, in order."""

    records: list[TensorRecord] = field(default_factory=list)

    def add(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Enter the tensors of a bucket."""
        self.records += [record_of(name, tensor) for name, tensor in tensors]


def record_of(name: str, tensor: Tensor) -> TensorRecord:
    """Describe a tensor; waits for its device."""
    dtype = SAFETENSORS_NAMES[str(tensor.dtype).removeprefix("torch.")]
    return TensorRecord(name, tuple(tensor.shape), dtype, checksum(tensor))


def checksum(tensor: Tensor) -> str:
    """See the head of this module."""
    bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
    rows = bits.reshape(bits.shape[0] if bits.dim() > 1 else -1, *((-1,) if bits.dim() > 1 else (1,)))
    sums = rows.sum(dim=1, dtype=torch.int64)
    numbers = torch.arange(1, len(sums) + 1, device=sums.device)
    plain, weighted = torch.stack((sums.sum(), (sums * numbers).sum())).tolist()
    return f"{plain & _MASK:016x}{weighted & _MASK:016x}"


def in_buckets(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[Bucket]:
    """Collect a stream into buckets of at most `max_bytes`, copied into one buffer that is used again and again; a larger
    tensor is a bucket of its own, in its own memory.

    Args:
        tensors: (name, tensor); each is only used until the next one is asked for.
    """
    buffer: Tensor | None = None
    held: list[tuple[str, Tensor]] = []
    used = 0
    for name, tensor in tensors:
        size = tensor.nbytes
        start = -(-used // 16) * 16
        if held and start + size > max_bytes:
            assert buffer is not None
            yield Bucket(held, buffer[:used])
            held, used, start = [], 0, 0
        if size > max_bytes:
            whole = tensor.contiguous()
            yield Bucket([(name, whole)], whole.reshape(-1).view(torch.uint8))
            continue
        if buffer is None:
            buffer = torch.empty(max_bytes, dtype=torch.uint8, device=tensor.device)
        place = buffer[start : start + size].view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor)
        held.append((name, place))
        used = start + size
    if held:
        assert buffer is not None
        yield Bucket(held, buffer[:used])


def check_stream(
    tensors: Iterable[tuple[str, Tensor]], records: Sequence[TensorRecord]
) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors on if they are what the manifest says.

    Raises:
        WeightSyncError: one is missing, twice, unexpected, out of order, of another shape or dtype, or was changed; names it.
    """
    expected = iter(records)
    seen: set[str] = set()
    for name, tensor in tensors:
        record = next(expected, None)
        if name in seen:
            raise WeightSyncError(f"{name} came twice; the sender and its manifest disagree")
        if record is None:
            raise WeightSyncError(f"{name} is not in the manifest; the sender holds another model")
        if record.name != name:
            raise WeightSyncError(
                f"{record.name} is missing, {name} came in its place; the sender and its manifest disagree"
            )
        found = record_of(name, tensor)
        if (found.shape, found.dtype) != (record.shape, record.dtype):
            raise WeightSyncError(
                f"{name} is {found.dtype} {list(found.shape)}, the manifest says {record.dtype} {list(record.shape)}"
            )
        if found.checksum != record.checksum:
            raise WeightSyncError(f"{name} was changed on the way: checksum {found.checksum}, sent {record.checksum}")
        seen.add(name)
        yield name, tensor
    missing = next(expected, None)
    if missing is not None:
        raise WeightSyncError(f"{missing.name} is missing; the stream ended early")
