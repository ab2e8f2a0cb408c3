"""torch_dist checkpoints for tests: tensors cut into any rectangles, written by our own `ChunkWriter`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_conversion.files.dtypes import SAFETENSORS_NAMES
from checkpoints_conversion.torch_dist import (
    Chunk,
    ChunkWriter,
    StoredTensor,
    TorchDistReader,
    read_common,
    write_common,
    write_metadata,
)


def dtype_name(tensor: Tensor) -> str:
    """safetensors' name of a tensor's dtype."""
    return SAFETENSORS_NAMES[str(tensor.dtype).removeprefix("torch.")]


def bytes_of(tensor: Tensor) -> bytes:
    """Row-major bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def random_tensor(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Any bit pattern, NaN included, that the dtype allows; compare bytes, not values."""
    count = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    return (
        torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)
    )


def grid(*cuts: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of all chunks of a tensor whose dimensions are cut at `cuts`, each from 0 to the size."""
    sides = [list(pairwise(cut)) for cut in cuts]
    return [(tuple(a for a, _ in box), tuple(b - a for a, b in box)) for box in product(*sides)]


def write_checkpoint(
    directory: Path, tensors: dict[str, tuple[Tensor, list[tuple[tuple[int, ...], tuple[int, ...]]]]], block: int = 1000
) -> list[StoredTensor]:
    """Write tensors, each with the chunks it is cut into, alternately to two files; blocks of `block` bytes."""
    directory.mkdir(exist_ok=True)
    writers = [ChunkWriter(directory / f"__{number}_0.distcp") for number in range(2)]
    stored = []
    for key, (tensor, boxes) in tensors.items():
        chunks = []
        for number, (offsets, sizes) in enumerate(boxes):
            writer = writers[number % 2]
            part = tensor[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))]
            data = memoryview(bytes_of(part))
            writer.begin(dtype_name(tensor), sizes)
            for at in range(0, len(data), block):
                writer.write(data[at : at + block])
            start, length, _ = writer.end()
            chunks.append(Chunk(offsets, sizes, writer.path.name, start, length))
        stored.append(StoredTensor(key, tuple(tensor.shape), dtype_name(tensor), tuple(chunks)))
    for writer in writers:
        writer.close()
    write_common(directory, {"iteration": 7})
    write_metadata(directory, stored)
    return stored


def read(reader: TorchDistReader, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> bytes:
    """A rectangle's bytes; the buffer is full of something else before."""
    tensor = reader.tensors[key]
    itemsize = torch.empty(
        (), dtype=getattr(torch, {v: k for k, v in SAFETENSORS_NAMES.items()}[tensor.dtype])
    ).itemsize
    out = bytearray(b"\xa5") * (torch.Size(sizes).numel() * itemsize)
    reader.read_into(key, offsets, sizes, memoryview(out))
    return bytes(out)


def read_all(reader: TorchDistReader, key: str) -> bytes:
    """A whole tensor's bytes."""
    shape = reader.tensors[key].shape
    return read(reader, key, (0,) * len(shape), shape)


WHOLE = random_tensor(4, 6, 8)
CUTS = grid([0, 1, 2, 4], [0, 4, 6], [0, 8])


def checkpoint(directory: Path) -> Path:
    """A small checkpoint to be damaged: `WHOLE` in six chunks as "w", a vector in two as "n"."""
    write_checkpoint(directory, {"w": (WHOLE, CUTS), "n": (random_tensor(5, dtype=torch.float32), grid([0, 2, 5]))})
    return directory


def use(directory: Path) -> None:
    """Everything a converter does with a checkpoint."""
    read_common(directory)
    with TorchDistReader(directory) as reader:
        for key, tensor in reader.tensors.items():
            read_all(reader, key)
            for chunk in tensor.chunks:
                reader.check_chunk(key, chunk)
