"""torch_dist checkpoints from strangers: nothing in them is executed, and every mistake is one line that names the file."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import resource
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch_dist_files import WHOLE, bytes_of, checkpoint, grid, random_tensor, read_all, use, write_checkpoint

from checkpoints_conversion.torch_dist import (
    Chunk,
    ChunkWriter,
    Record,
    StoredTensor,
    TorchDistReader,
    read_common,
    write_common,
    write_metadata,
)
from checkpoints_conversion.torch_dist.pickles import Malformed, read_pickle
from checkpoints_conversion.torch_dist.writer import tensor_pickle
from oprd_megatron.errors import CheckpointError


class Evil:
    """Unpickled by `pickle`, this creates a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.sentinel}",)


def refused(directory: Path, file: str, *words: str) -> None:
    """`use` says in one line which file is wrong and how."""
    with pytest.raises(CheckpointError) as caught:
        use(directory)
    message = str(caught.value)
    assert message.startswith(str(directory / file)) and "\n" not in message and "; " in message, message
    assert all(word in message for word in words), message


def edit_metadata(directory: Path, change: Callable[[Metadata], object]) -> None:
    """Load `.metadata` as torch does, change it, write it back."""
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def test_malicious_pickles_are_not_executed(tmp_path: Path) -> None:
    """A call in `.metadata`, in common.pt or in a chunk is refused or comes back as a record; pickle.load would run it."""
    sentinel = tmp_path / "executed"
    evil = Evil(sentinel)

    directory = checkpoint(tmp_path / "common")
    write_common(directory, {"args": evil})
    record = read_common(directory)["args"]
    assert type(record) is Record and record.name == f"{os.system.__module__}.system"
    assert record.args == (f"touch {sentinel}",)
    torch.save(evil, directory / "common.pt")
    refused(directory, "common.pt", "no dict")

    directory = checkpoint(tmp_path / "metadata")
    edit_metadata(directory, lambda metadata: setattr(metadata, "planner_data", evil))
    use(directory)  # a field that nobody needs
    edit_metadata(checkpoint_again(directory), lambda m: m.state_dict_metadata.update(w=evil))
    use(directory)  # an entry of a kind unknown
    (directory / ".metadata").write_bytes(pickle.dumps(evil))
    refused(directory, ".metadata", "no Metadata")

    directory = checkpoint(tmp_path / "chunk")
    save_over(directory / "__0_0.distcp", evil)
    refused(directory, "__0_0.distcp", "no plain tensor")
    assert not sentinel.exists()
    torch.load(directory / "__0_0.distcp", weights_only=False)
    assert sentinel.exists(), "the pickle was harmless, so this test tests nothing"


def checkpoint_again(directory: Path) -> Path:
    shutil.rmtree(directory)
    return checkpoint(directory)


def save_over(path: Path, value: Any) -> None:
    """Put `torch.save(value)` in the place of the whole file, and give all its chunks in `.metadata` that place."""
    torch.save(value, path)
    length = path.stat().st_size

    def move(metadata: Metadata) -> None:
        del metadata.state_dict_metadata["n"]
        metadata.storage_data = {index: info for index, info in metadata.storage_data.items() if index.fqn == "w"}
        for number, info in enumerate(
            info for info in metadata.storage_data.values() if info.relative_path == path.name
        ):
            info.offset, info.length = 0, length if number == 0 else 0
        one = next(index for index, info in metadata.storage_data.items() if info.relative_path == path.name)
        tensor = metadata.state_dict_metadata["w"]
        tensor.chunks = [chunk for chunk in tensor.chunks if chunk.offsets == one.offset]
        tensor.size = tensor.chunks[0].sizes

    edit_metadata(path.parent, move)


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02}(" + b")" + b"\x85" * 1_000_000 + b"K\x01u.",  # CPython's own unpickler ends here with a segmentation fault
        b"\x80\x02K\x01r\xff\xff\xff\x7f" + b"K\x01r\xff\xff\xff\x7e.",  # .. and takes 34 GB for this memo
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # 8 EiB of bytes
        b"\x80\x02" + b"(" * 1_000_000 + b".",
        b"\x80\x02" + b"]" * 500_000 + b"a" * 499_999 + b".",  # lists in lists
        b"\x80\x02)" + b"\x85" * 1_000_000 + b"\x85.",
        b"\x80\x02cos\nsystem\nX\x01\x00\x00\x00a\x85R.",
        b"\x80\x02c" + b"x" * 100_000 + b"\ny\n.",
        b"\x80\x02}q\x00(" + b"".join(b"J" + n.to_bytes(4, "little") + b"N" for n in range(100_000)) + b"u0]("
        + b"ca\nb\n)\x81h\x00b" * 300 + b"e.",  # 300 objects whose state is one dict of 100,000
        b"\x80\x02\x82\x01.",  # an extension code
        b"(i__builtin__\neval\n.",  # protocol 0
        b"\x80\x02.",
        b"",
    ],
)  # fmt: skip
def test_hostile_pickles_stay_small(pickled: bytes) -> None:
    """Bombs of depth, of size and of memo indices are read or refused, in little time and memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    try:
        read_pickle(pickled)
    except Malformed as error:
        assert "\n" not in str(error)
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024


def test_structural_mistakes_name_the_file(tmp_path: Path) -> None:
    """Files that are missing, cut off or contradict each other are refused when the checkpoint is opened."""
    directory = tmp_path / "ckpt"

    def fresh() -> Path:
        shutil.rmtree(directory, ignore_errors=True)
        return checkpoint(directory)

    (fresh() / "__1_0.distcp").unlink()
    refused(directory, "__1_0.distcp", "No such file")
    os.truncate(fresh() / "__1_0.distcp", 4000)
    refused(directory, "__1_0.distcp", "has 4000 bytes", "truncated")
    (fresh() / "metadata.json").unlink()
    refused(directory, "", "has no metadata.json", "no finished checkpoint")
    (fresh() / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1}))
    refused(directory, "metadata.json", "torch_dist")
    (fresh() / "metadata.json").write_text("[" * 60000)
    refused(directory, "metadata.json", "JSON")
    os.truncate(fresh() / ".metadata", 900)
    refused(directory, ".metadata", "torn")
    (fresh() / "common.pt").unlink()
    refused(directory, "common.pt", "No such file")
    os.mkfifo(fresh() / "fifo")
    move_first_chunk(directory, relative_path="fifo")
    refused(directory, "fifo", "no regular file")


def move_first_chunk(directory: Path, **place: Any) -> None:
    def change(metadata: Metadata) -> None:
        vars(next(iter(metadata.storage_data.values()))).update(place)

    edit_metadata(directory, change)


@pytest.mark.parametrize("name", ["../other/__0_0.distcp", "/etc/passwd", "link", "", "..", "a\0b", "a\nb"])
def test_files_outside_the_directory_are_not_opened(name: str, tmp_path: Path) -> None:
    """Neither a path nor a link in `.metadata` leads out of the checkpoint."""
    checkpoint(tmp_path / "other")
    directory = checkpoint(tmp_path / "ckpt")
    (directory / "link").symlink_to(tmp_path / "other" / "__0_0.distcp")
    move_first_chunk(directory, relative_path=name)
    with pytest.raises(CheckpointError) as caught:
        use(directory)
    assert any(word in str(caught.value) for word in ("outside", "regular", "named")) and "\n" not in str(caught.value)


def test_a_link_inside_the_directory_is_followed(tmp_path: Path) -> None:
    """Only what lies elsewhere is refused."""
    directory = checkpoint(tmp_path / "ckpt")
    (directory / "__1_0.distcp").rename(directory / "real")
    (directory / "__1_0.distcp").symlink_to("real")
    use(directory)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda m: vars(m.state_dict_metadata["w"]).update(size=torch.Size([2**40, 6, 8])), "do not add up"),
        (
            lambda m: vars(m.state_dict_metadata["w"].chunks[0]).update(sizes=torch.Size([2**61, 2**61, 8])),
            "beyond its shape",
        ),
        (lambda m: vars(m.state_dict_metadata["w"].chunks[0]).update(sizes=torch.Size([1, 3, 8])), "do not add up"),
        (lambda m: vars(m.state_dict_metadata["w"].chunks[0]).update(offsets=torch.Size([0, -1, 0])), "without sizes"),
        (
            lambda m: vars(m.state_dict_metadata["w"].chunks[0]).update(offsets=torch.Size([3, 4, 0])),
            "beyond its shape",
        ),
        (lambda m: vars(m.state_dict_metadata["w"].chunks[0]).update(offsets=torch.Size([0, 0])), "without sizes"),
        (lambda m: m.state_dict_metadata["w"].chunks.pop(), "do not add up"),
        (lambda m: m.state_dict_metadata["w"].chunks.__setitem__(0, m.state_dict_metadata["w"].chunks[2]), "overlap"),
        (lambda m: m.storage_data.popitem(), "no file holds"),
        (lambda m: vars(next(iter(m.storage_data.values()))).update(offset=-1), "impossible place"),
        (lambda m: vars(next(iter(m.storage_data.values()))).update(offset=2**63), "impossible place"),
        (lambda m: vars(next(iter(m.storage_data.values()))).update(length=2**40), "truncated"),
        (lambda m: vars(next(iter(m.storage_data.values()))).update(length=10), "larger than its place"),
        (lambda m: vars(next(iter(m.storage_data.values()))).update(length=True), "impossible place"),
        (lambda m: vars(next(iter(m.storage_data.values()))).update(transform_descriptors=["zstd"]), "transform"),
        (lambda m: vars(m).update(storage_data=None), "no tables"),
        (lambda m: m.state_dict_metadata.update({3: m.state_dict_metadata["w"]}), "no text"),
    ],
)
def test_tables_that_cannot_be_are_refused(change: Callable[[Metadata], object], word: str, tmp_path: Path) -> None:
    """Sizes, offsets and places that are negative, too large, or do not fit each other; nothing is allocated for them."""
    directory = checkpoint(tmp_path / "ckpt")
    edit_metadata(directory, change)
    with pytest.raises(CheckpointError) as caught:
        use(directory)
    assert str(caught.value).startswith(str(directory)) and "\n" not in str(caught.value)
    assert word in str(caught.value)


@pytest.mark.parametrize(("offsets", "word"), [([1, 1], "overlap"), ([4, 0], "beyond its shape")])
def test_chunks_that_add_up_elsewhere_are_refused(offsets: list[int], word: str, tmp_path: Path) -> None:
    """Volumes that add up are not enough: a chunk over another or outside the tensor leaves a gap, and is told."""
    directory = tmp_path / "ckpt"
    write_checkpoint(directory, {"w": (random_tensor(4, 4), grid([0, 1, 2, 3, 4], [0, 2, 4]))})

    def shift(metadata: Metadata) -> None:
        chunk, index = metadata.state_dict_metadata["w"].chunks[2], list(metadata.storage_data)[2]
        info = metadata.storage_data.pop(index)
        chunk.offsets = torch.Size(offsets)
        metadata.storage_data[type(index)("w", chunk.offsets)] = info

    edit_metadata(directory, shift)
    refused(directory, ".metadata", word, "'w'")


def test_containers_that_are_no_plain_tensor_are_refused(tmp_path: Path) -> None:
    """Transposed, of another dtype, compressed, or with more claimed than is there."""
    data = WHOLE[:1, :4]
    for value, word in [
        (data.transpose(1, 2).contiguous().transpose(1, 2), "strides"),
        (data.view(torch.float16), "BF16"),
        (data.reshape(4, 8, 1), "places"),
        (data.to_sparse(), "no plain tensor"),
        ({"w": data}, "no plain tensor"),
    ]:
        shutil.rmtree(tmp_path / "ckpt", ignore_errors=True)
        directory = checkpoint(tmp_path / "ckpt")
        save_over(directory / "__0_0.distcp", value)
        refused(directory, "__0_0.distcp", word)


@pytest.mark.parametrize(
    ("records", "compression", "word"),
    [
        ({}, zipfile.ZIP_STORED, None),
        ({}, zipfile.ZIP_DEFLATED, "compressed"),
        ({"data/0": bytes(63)}, zipfile.ZIP_STORED, "only 63 bytes"),
        ({"byteorder": b"big"}, zipfile.ZIP_STORED, "big-endian"),
        ({"data.pkl": bytes(2**17)}, zipfile.ZIP_STORED, "a pickle of 131072 bytes"),
    ],
)
def test_zips_by_other_writers(records: dict[str, bytes], compression: int, word: str | None, tmp_path: Path) -> None:
    """A zip of any writer is read when its records are right; not when they are compressed, too short or too long."""
    directory = checkpoint(tmp_path / "ckpt")
    path = directory / "__0_0.distcp"
    data = WHOLE[:1, :4]
    save_over(path, data)
    right = {"data.pkl": tensor_pickle("BF16", (1, 4, 8)), "byteorder": b"little", "data/0": bytes_of(data)}
    with zipfile.ZipFile(path, "w", compression) as zipped:
        for name, content in {**right, **records}.items():
            zipped.writestr(f"archive/{name}", content)
    with path.open("ab") as file:
        file.write(bytes(1000))  # what follows the container in its file
    move_first_chunk(directory, length=path.stat().st_size - 1000)
    if word is None:
        use(directory)
    else:
        refused(directory, path.name, word)


def test_a_flipped_bit_in_the_data_is_found(tmp_path: Path) -> None:
    """`read_into` trusts the bytes; `check_chunk` does not."""
    directory = checkpoint(tmp_path / "ckpt")
    with TorchDistReader(directory) as reader:
        chunk = next(c for c in reader.tensors["w"].chunks if c.file == "__0_0.distcp")
    content = bytearray((directory / chunk.file).read_bytes())
    at = content.index(bytes_of(WHOLE[0, :1]))
    content[at] ^= 1
    (directory / chunk.file).write_bytes(content)
    refused(directory, chunk.file, "crc32", "'w'")


def test_containers_without_checksums_say_so(tmp_path: Path) -> None:
    """torch can be told to leave the crc32 out; then `check_chunk` knows nothing rather than something wrong."""
    directory = checkpoint(tmp_path / "ckpt")
    torch.serialization.set_crc32_options(False)
    try:
        save_over(directory / "__0_0.distcp", WHOLE[:1, :4])
    finally:
        torch.serialization.set_crc32_options(True)
    with TorchDistReader(directory) as reader:
        assert reader.check_chunk("w", reader.tensors["w"].chunks[0]) is False
        assert read_all(reader, "w") == bytes_of(WHOLE[:1, :4])


def test_writing_over_a_file_is_refused(tmp_path: Path) -> None:
    """Chunks never go into a file that exists, nor into a directory that does not."""
    (tmp_path / "a.distcp").touch()
    for path, word in ((tmp_path / "a.distcp", "File exists"), (tmp_path / "none" / "a.distcp", "No such file")):
        with pytest.raises(CheckpointError, match=f"{path}: cannot be written .{word}"):
            ChunkWriter(path)


def test_a_save_that_fails_publishes_nothing(tmp_path: Path) -> None:
    """Without `.metadata` there is no metadata.json either, and chunks that do not tile their tensor are not published."""
    (tmp_path / ".metadata").mkdir()
    stored = StoredTensor("w", (2,), "F32", (Chunk((0,), (2,), "a.distcp", 0, 9),))
    with pytest.raises(CheckpointError, match="metadata: cannot be written"):
        write_metadata(tmp_path, [stored])
    (tmp_path / ".metadata").rmdir()
    with pytest.raises(Malformed, match="do not add up"):
        write_metadata(tmp_path, [dataclasses.replace(stored, shape=(3,))])
    assert not (tmp_path / "metadata.json").exists()
