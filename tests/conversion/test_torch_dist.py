"""torch_dist checkpoints: what we write, torch and megatron-core read; what megatron-core writes, we read. Bit for bit."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import zipfile
from argparse import Namespace
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conversion_models import write_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories
from test_real_mcore import build
from torch import Tensor
from torch_dist_files import bytes_of, dtype_name, grid, random_tensor, read, read_all, write_checkpoint

from checkpoints_conversion.files.dtypes import TORCH_NAMES
from checkpoints_conversion.torch_dist import (
    ChunkWriter,
    Record,
    StoredObject,
    StoredTensor,
    TorchDistReader,
    read_common,
    write_common,
    write_metadata,
    writer,
)
from checkpoints_conversion.torch_dist.pickles import read_pickle
from oprd_megatron.errors import CheckpointError
from oprd_megatron.parallel.grid import as_parallel_state
from oprd_megatron.platform import select_platform
from tests.ranks import run_ranks

SHAPES = [(), (5,), (3, 4), (1, 300, 7), (2, 1, 3, 1), (70000,), (2, 0, 3)]
FINGERPRINT = "archive/.data/serialization_id"


def write_one(path: Path, tensor: Tensor) -> bytes:
    """The container of one tensor that begins in the middle of a file, cut out of it."""
    path.unlink(missing_ok=True)
    with ChunkWriter(path) as chunks:
        chunks.write_object(b"abc")
        chunks.begin(dtype_name(tensor), tuple(tensor.shape))
        chunks.write(bytes_of(tensor))
        start, length, _ = chunks.end()
    data = path.read_bytes()
    assert start == 3 and length == len(data) - 3
    return data[3:]


def saved_by_torch(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", TORCH_NAMES.values())
def test_containers_are_those_of_torch_save(dtype: str, tmp_path: Path) -> None:
    """Same records, same pickles, same length as torch.save, and torch loads the same bits under weights_only."""
    for seed, shape in enumerate(SHAPES):
        tensor = random_tensor(*shape, dtype=getattr(torch, dtype), seed=seed)
        ours, theirs = write_one(tmp_path / "one.distcp", tensor), saved_by_torch(tensor)
        with zipfile.ZipFile(io.BytesIO(ours)) as mine, zipfile.ZipFile(io.BytesIO(theirs)) as reference:
            assert mine.testzip() is None  # every crc32
            assert mine.namelist() == reference.namelist() and len(ours) == len(theirs)
            assert all(mine.read(n) == reference.read(n) for n in mine.namelist() if n != FINGERPRINT)
        loaded = torch.load(io.BytesIO(ours), weights_only=True)
        assert loaded.dtype == tensor.dtype and loaded.shape == tensor.shape and bytes_of(loaded) == bytes_of(tensor)


def test_sizes_of_any_width_are_pickled() -> None:
    """Sizes around the borders of pickle's integer forms are written as `pickle` writes them and read back."""
    for size in (0, 255, 256, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 + 5, 2**39, 2**47, 2**48):
        pickled = writer.tensor_pickle("U8", (size, 1))
        assert read_pickle(pickled).args[2] == (size, 1)
        assert pickle.dumps(size, 2)[2:-1] in pickled


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that takes a few bytes at a time gets all of them."""
    tensor, take = random_tensor(100, 7), os.write
    whole = write_one(tmp_path / "one.distcp", tensor)
    monkeypatch.setattr(os, "write", lambda fd, data: take(fd, data[:100]))
    assert write_one(tmp_path / "one.distcp", tensor) == whole


def test_records_beyond_the_32_bit_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 64-bit forms of sizes and positions are read by torch and by us; the limit is lowered to have them in small."""
    monkeypatch.setattr(writer, "ZIP64_LIMIT", 700)
    tensor = random_tensor(9, 100)
    torch.testing.assert_close(
        torch.load(io.BytesIO(write_one(tmp_path / "one.distcp", tensor)), weights_only=True), tensor, rtol=0, atol=0,
        equal_nan=True,
    )  # fmt: skip
    write_checkpoint(tmp_path / "wide", {"w": (tensor, grid([0, 4, 9], [0, 100]))})
    with TorchDistReader(tmp_path / "wide") as reader:
        assert read_all(reader, "w") == bytes_of(tensor)
        assert all(reader.check_chunk("w", chunk) for chunk in reader.tensors["w"].chunks)


def test_torch_loads_what_we_write(tmp_path: Path) -> None:
    """Plain torch.distributed.checkpoint fills tensors of every dtype from chunks of any cut, 0-d included."""
    tensors = {
        name: (random_tensor(10, 6, dtype=getattr(torch, dtype), seed=seed), grid([0, 3, 4, 10], [0, 5, 6]))
        for seed, (name, dtype) in enumerate(TORCH_NAMES.items())
    }
    tensors["scalar"] = (torch.tensor(2.5), [((), ())])
    write_checkpoint(tmp_path / "ckpt", tensors)
    state = {key: torch.zeros_like(tensor) for key, (tensor, _) in tensors.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path / "ckpt"), no_dist=True)
    assert all(bytes_of(state[key]) == bytes_of(tensor) for key, (tensor, _) in tensors.items())


class Kind(Enum):
    """An enum in the arguments, as megatron-core has them."""

    LOCAL = "local"


def load_with_mcore(directory: Path) -> dict[str, Any]:
    """On one rank: [3, 4, 12] by layers and thirds of the columns (our chunks are cut at column 5), and an object."""
    parts = {
        f"{layer}-{third}": ShardedTensor.from_rank_offsets(
            "w", torch.empty(4, 4, dtype=torch.bfloat16), (0, layer, 3), (2, third, 3), prepend_axis_num=1
        )
        for layer in range(3)
        for third in range(3)
    }
    extra = ShardedObject("w._extra_state", None, (1,), (0,))
    state = {"parts": parts, "norm": ShardedTensor.from_rank_offsets("n", torch.empty(7)), "extra": extra}
    with select_platform("cpu").scope():
        return dist_checkpointing.load(state, str(directory))


def test_mcore_loads_what_we_write(tmp_path: Path) -> None:
    """megatron-core cuts our chunks anew: prepended axes, column slices across our borders, objects, common.pt."""
    whole, norm = random_tensor(3, 4, 12), random_tensor(7, dtype=torch.float32, seed=1)
    stored = write_checkpoint(
        tmp_path / "ckpt", {"w": (whole, grid([0, 1, 2, 3], [0, 3, 4], [0, 5, 12])), "n": (norm, grid([0, 7]))}
    )
    with ChunkWriter(tmp_path / "ckpt" / "objects.distcp") as objects:
        place = objects.write_object(saved_by_torch([torch.ones(3)]))
    extra = StoredObject("w._extra_state/shard_0_1", "objects.distcp", *place)
    write_metadata(tmp_path / "ckpt", stored, [extra])
    (loaded,) = run_ranks(1, load_with_mcore, tmp_path / "ckpt")
    for layer in range(3):
        for third in range(3):
            expected = whole[layer, :, 4 * third : 4 * third + 4]
            assert bytes_of(loaded["parts"][f"{layer}-{third}"]) == bytes_of(expected)
    assert bytes_of(loaded["norm"]) == bytes_of(norm) and torch.equal(loaded["extra"], torch.ones(3))
    assert loaded["iteration"] == 7
    with TorchDistReader(tmp_path / "ckpt") as reader:
        assert reader.other_keys == {extra.key}


def save_with_mcore(hf_dir: Path, directory: Path) -> list[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]]:
    """On one rank of TP2: save a GPTModel; (key, offsets, sizes, data) of the pieces that this rank holds."""
    platform = select_platform("cpu")
    model = build(hf_dir, 2, 1)
    with platform.scope(), as_parallel_state(model.grid):
        state: dict[str, Any] = {"model": model.chunks[0].sharded_state_dict()}
        apply_factories(state)  # the two halves of a gated linear_fc1
        pieces = [piece for piece in nested_values(state) if isinstance(piece, ShardedTensor)]
        found = [
            (p.key, tuple(p.global_offset), (1,) * p.prepend_axis_num + tuple(p.local_shape), p.data.detach().clone())
            for p in pieces
        ]
        state.update(iteration=3, args=Namespace(kind=Kind.LOCAL, params_dtype=torch.bfloat16, layers=3))
        dist_checkpointing.save(state, str(directory))
    return found


def test_a_model_saved_by_mcore_is_read_bitwise(tmp_path: Path) -> None:
    """Every piece of a GPTModel saved on TP2 is read back from the global tensors; dtypes, checksums and arguments fit."""
    write_tiny_model("qwen3", tmp_path / "hf")
    (tmp_path / "ckpt").mkdir()
    saved = run_ranks(2, save_with_mcore, tmp_path / "hf", tmp_path / "ckpt")
    with TorchDistReader(tmp_path / "ckpt") as reader:
        assert {key for rank in saved for key, *_ in rank} == reader.tensors.keys()
        for key, offsets, sizes, data in (piece for rank in saved for piece in rank):
            assert reader.tensors[key].dtype == "F32"
            assert read(reader, key, offsets, sizes) == bytes_of(data), key
        for key, tensor in reader.tensors.items():
            assert all(reader.check_chunk(key, chunk) for chunk in tensor.chunks)
    common = read_common(tmp_path / "ckpt")
    assert common["iteration"] == 3
    arguments = vars(common["args"])
    assert arguments["layers"] == 3 and arguments["params_dtype"] == "BF16" and arguments["kind"].args == ("local",)


def test_objects_in_common_are_inert(tmp_path: Path) -> None:
    """Containers come back as they are; objects, tensors and enums as records that only know what they were called."""
    import numpy as np

    common = {
        "plain": [1, -5, 2**40, 1.5, None, True, "text", (1, 2), {"a": {2, 3}}],
        "tensor": torch.ones(2),
        "array": np.arange(3),
        "namespace": SimpleNamespace(a=1),
    }
    write_common(tmp_path, common)
    found = read_common(tmp_path)
    assert found["plain"][:-1] == common["plain"][:-1]  # type: ignore[index]
    assert all(type(found[key]) is Record for key in ("tensor", "array", "namespace"))
    assert vars(found["namespace"]) == {"a": 1} and found["namespace"].name == "types.SimpleNamespace"


def cut(size: int) -> st.SearchStrategy[list[int]]:
    return st.sets(st.integers(1, max(1, size - 1)), max_size=3).map(
        lambda at: sorted({0, size} | {a for a in at if a < size})
    )


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[int]], list[tuple[int, int]]]:
    """A shape, where each dimension is cut, and a rectangle as (first, last) per dimension."""
    shape = tuple(draw(st.lists(st.integers(1, 9), max_size=4)))
    rectangle = []
    for size in shape:
        first = draw(st.integers(0, size))
        rectangle.append((first, draw(st.integers(first, size))))
    return shape, [draw(cut(size)) for size in shape], rectangle


@settings(max_examples=150, deadline=None)
@given(
    case=cut_tensors(), block_bytes=st.sampled_from([1, 16, 50, 2**22]), dtype=st.sampled_from(["bfloat16", "int64"])
)
def test_any_rectangle_is_what_slicing_gives(
    case: tuple[tuple[int, ...], list[list[int]], list[tuple[int, int]]],
    block_bytes: int,
    dtype: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Any rectangle of a tensor of any rank, cut anyhow, is the slice of the whole; for any size of block."""
    shape, cuts, rectangle = case
    whole = random_tensor(*shape, dtype=getattr(torch, dtype))
    directory = tmp_path_factory.mktemp("cut")
    write_checkpoint(directory, {"w": (whole, grid(*cuts))}, block=7)
    offsets, sizes = tuple(a for a, _ in rectangle), tuple(b - a for a, b in rectangle)
    with TorchDistReader(directory) as reader, pytest.MonkeyPatch.context() as patch:
        patch.setattr("checkpoints_conversion.torch_dist.reader.BLOCK_BYTES", max(block_bytes, whole.itemsize))
        assert read(reader, "w", offsets, sizes) == bytes_of(whole[tuple(slice(a, b) for a, b in rectangle)])
        assert read_all(reader, "w") == bytes_of(whole)


def test_blobs_without_prepended_axes(tmp_path: Path) -> None:
    """A chunk [1, 2, 3] whose blob is [2, 3] is read alike; a blob of any other shape is refused by name."""
    whole = random_tensor(2, 2, 3)
    for sizes, fine in {(2, 3): True, (3, 2): False, (1, 1, 2, 3): False}.items():
        directory = tmp_path / str(sizes)
        directory.mkdir()
        chunks = []
        with ChunkWriter(directory / "a.distcp") as out:
            for layer in range(2):
                out.begin("BF16", sizes)
                out.write(bytes_of(whole[layer]))
                chunks.append((layer, out.end()))
        (stored,) = write_checkpoint(directory, {"w": (whole, grid([0, 1, 2], [0, 2], [0, 3]))})
        moved = tuple(
            type(chunk)(chunk.offsets, chunk.sizes, "a.distcp", place[0], place[1])
            for chunk, (_, place) in zip(stored.chunks, chunks, strict=True)
        )
        write_metadata(directory, [StoredTensor("w", stored.shape, stored.dtype, moved)])
        with TorchDistReader(directory) as reader:
            if fine:
                assert read_all(reader, "w") == bytes_of(whole)
            else:
                with pytest.raises(CheckpointError, match=r"a\.distcp: \.metadata places BF16 \[1, 2, 3\] of 'w'"):
                    read_all(reader, "w")


def test_more_files_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one open file the others are closed and opened again."""
    monkeypatch.setattr("checkpoints_conversion.torch_dist.reader.MAX_OPEN_FILES", 1)
    monkeypatch.setattr("checkpoints_conversion.torch_dist.reader.MAX_KNOWN_HEADERS", 1)
    whole = random_tensor(6, 4)
    write_checkpoint(tmp_path, {"w": (whole, grid([0, 2, 4, 6], [0, 4]))})
    before = len(list(Path("/proc/self/fd").iterdir()))
    with TorchDistReader(tmp_path) as reader:
        assert read_all(reader, "w") == read_all(reader, "w") == bytes_of(whole)
        assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_torch_is_not_imported(tmp_path: Path) -> None:
    """Writing chunks, opening and reading a checkpoint and its common.pt do without torch."""
    write_checkpoint(tmp_path / "ckpt", {"w": (random_tensor(4, 4), grid([0, 4], [0, 4]))})
    program = f"""
import sys
from checkpoints_conversion.torch_dist import ChunkWriter, TorchDistReader, read_common
with ChunkWriter({str(tmp_path / "a.distcp")!r}) as out:
    out.begin("F32", (2,)); out.write(bytes(8)); out.end()
with TorchDistReader({str(tmp_path / "ckpt")!r}) as reader:
    reader.read_into("w", (0, 0), (4, 4), memoryview(bytearray(32)))
    assert reader.check_chunk("w", reader.tensors["w"].chunks[0])
assert read_common({str(tmp_path / "ckpt")!r}) == {{"iteration": 7}}
assert "torch" not in sys.modules, "torch was imported"
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
