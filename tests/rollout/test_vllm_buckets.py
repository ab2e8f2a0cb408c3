"""Weights in buckets: the format, what its reader refuses, and the sender's steps with servers that only keep the books."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from oprd_megatron.errors import UserError, WeightSyncError
from oprd_megatron.rollout.vllm import weight_transfer
from oprd_megatron.rollout.vllm.weight_transfer import BucketSender, TransferFolder
from oprd_megatron.vllm_worker import buckets
from oprd_megatron.vllm_worker.buckets import BucketWriter, Entry, Ledger, read_bucket, read_manifest, write_manifest

KIB = 1024


def tensors() -> dict[str, torch.Tensor]:
    """Of several dtypes and shapes, a scalar and a view that is not contiguous among them."""
    generator = torch.Generator().manual_seed(3)
    wide = torch.randn(24, 16, generator=generator)
    return {
        "model.wide": wide,
        "model.turned": wide.T,
        "model.half": wide.bfloat16(),
        "model.scalar": torch.tensor(2.5),
        "model.eight": wide.to(torch.float8_e4m3fn),
    }


def written(folder: Path, weights: dict[str, torch.Tensor], name: str = "b0.safetensors") -> tuple[Path, list[Entry]]:
    """A bucket that holds all of `weights`."""
    writer = BucketWriter(folder / name, 2**20)
    for weight, tensor in weights.items():
        writer.add(weight, tensor)
    writer.close()
    return writer.path, writer.entries


def test_bucket_returns_the_same_bytes_and_is_a_safetensors_file(tmp_path: Path) -> None:
    """What is read is what was written, for every dtype; any reader of the format can read it."""
    from safetensors.torch import load_file

    path, entries = written(tmp_path, tensors())
    read = dict(read_bucket(path, entries))
    assert list(read) == list(tensors())
    for found in (read, load_file(path)):
        for name, tensor in tensors().items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name].float(), tensor.float())
    assert [entry.name for entry in tmp_path.iterdir()] == ["b0.safetensors"]


def test_a_bucket_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    """A writer that is killed leaves no file that could be taken for a bucket."""
    writer = BucketWriter(tmp_path / "b0.safetensors", 2**20)
    writer.add("w", torch.ones(4))
    assert [path.name for path in tmp_path.iterdir()] == ["b0.safetensors.tmp"]
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["b0.safetensors"]


@pytest.mark.parametrize("weight", tensors())
def test_one_changed_bit_is_found_and_its_tensor_named(tmp_path: Path, weight: str) -> None:
    """A checksum covers every tensor to its last byte, and nothing after a bad tensor is given out."""
    path, entries = written(tmp_path, tensors())
    content = bytearray(path.read_bytes())
    header = json.loads(content[8 : buckets.DATA_START])
    content[buckets.DATA_START + header[weight]["data_offsets"][1] - 1] ^= 1
    path.write_bytes(content)
    given: list[str] = []
    with pytest.raises(WeightSyncError, match=f"bytes of '{weight}' are not those that were sent"):
        given.extend(name for name, _ in read_bucket(path, entries))
    assert weight not in given


@pytest.mark.parametrize(
    ("announced", "message"),
    [
        (lambda entries: entries[1:], "'model.wide' is in the bucket and was not announced"),
        (lambda entries: [*entries, dataclasses.replace(entries[0], name="b")], "'b' was announced and is not"),
        (lambda entries: [*entries, entries[0]], "announced twice"),
        (lambda entries: [dataclasses.replace(entries[0], shape=(16, 24)), *entries[1:]], r"F32 \[24, 16\], announced"),
        (lambda entries: [dataclasses.replace(entries[0], dtype="BF16"), *entries[1:]], "announced was BF16"),
    ],
)
def test_reader_refuses_what_was_not_announced(tmp_path: Path, announced: Callable, message: str) -> None:
    """Names, shapes and dtypes are those of the request."""
    path, entries = written(tmp_path, tensors())
    with pytest.raises(WeightSyncError, match=message):
        list(read_bucket(path, announced(entries)))


@pytest.mark.parametrize("size", [0, 5, 4096, buckets.DATA_START, buckets.DATA_START + 100])
def test_torn_bucket_is_refused(tmp_path: Path, size: int) -> None:
    """A file that was cut anywhere is an error in one line."""
    path, entries = written(tmp_path, tensors())
    os.truncate(path, size)
    with pytest.raises(WeightSyncError, match="missing or torn") as refused:
        list(read_bucket(path, entries))
    assert "\n" not in str(refused.value)


def test_missing_bucket_and_torn_manifest_are_refused(tmp_path: Path) -> None:
    """Neither a file that is not there nor half a manifest passes."""
    with pytest.raises(WeightSyncError, match="missing or torn"):
        list(read_bucket(tmp_path / "none.safetensors", []))
    path, entries = written(tmp_path, tensors())
    manifest = write_manifest(path.parent, 4, entries)
    assert read_manifest(manifest) == (4, entries)
    os.truncate(manifest, manifest.stat().st_size // 2)
    with pytest.raises(WeightSyncError, match="not a manifest of a whole update"):
        read_manifest(manifest)
    with pytest.raises(WeightSyncError, match="not a manifest of a whole update"):
        read_manifest(tmp_path / "none.json")


def test_update_is_whole_only_with_every_announced_tensor_once(tmp_path: Path) -> None:
    """Missing, unexpected and repeated tensors, and a manifest of another version, are found over all buckets."""
    first, first_entries = written(tmp_path, {"a": torch.ones(3)}, "b0.safetensors")
    second, second_entries = written(tmp_path, {"b": torch.ones(2)}, "b1.safetensors")
    every = [*first_entries, *second_entries]

    def ledger(*buckets_read: tuple[Path, list[Entry]]) -> Ledger:
        books = Ledger(1)
        for path, entries in buckets_read:
            list(books.read(path, entries))
        return books

    for books, entries, version, message in (
        (ledger((first, first_entries)), every, 1, "1 of 2 tensors missing, the first is 'b'"),
        (ledger((first, first_entries), (second, second_entries)), first_entries, 1, "unexpected, the first is 'b'"),
        (ledger((first, first_entries), (second, second_entries)), every, 2, "is of version 2, the update is of version 1"),
        (ledger((first, first_entries)), [dataclasses.replace(first_entries[0], crc32=1)], 1, "other bytes than announced"),
        (ledger((first, first_entries)), first_entries * 2, 1, "listed twice"),
    ):  # fmt: skip
        with pytest.raises(WeightSyncError, match=message):
            books.settle(write_manifest(tmp_path, version, entries))
        assert not books.is_whole
    with pytest.raises(WeightSyncError, match="'a' was sent twice in update 1"):
        ledger((first, first_entries), (first, first_entries))
    whole = ledger((first, first_entries), (second, second_entries))
    whole.settle(write_manifest(tmp_path, 1, every))
    assert whole.is_whole


def test_vllm_side_needs_nothing_of_ours() -> None:
    """The modules that a vLLM process imports pull in neither megatron-core nor transformers nor pydantic."""
    program = (
        "import sys, oprd_megatron.vllm_worker.buckets, oprd_megatron.vllm_worker.launch\n"
        "print([name for name in ('megatron', 'transformers', 'pydantic', 'httpx', 'yaml') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"


class Books:
    """A server that reads buckets and keeps the books, and refuses at a command of the test's choice."""

    def __init__(self, url: str, refuses_at: str | None = None) -> None:
        self.url, self.refuses_at = url, refuses_at
        self.commands: list[str] = []
        self.ledger = Ledger(-1)
        self.weights: dict[str, torch.Tensor] = {}
        self.version = "none"
        self.can_empty_cache = True
        self.num_files: list[int] = []
        """Buckets in the folder at each load."""
        self.before_load: Callable[[], None] = lambda: None

    def post(self, path: str, body: dict | None, seconds: float) -> dict:
        self.commands.append(path)
        if path == self.refuses_at:
            raise UserError(f"{self.url}: {path} refused")
        if path == "/start_weight_update":
            self.ledger = Ledger(-1)
        if path == "/update_weights":
            assert body is not None
            self._update(body["update_info"])
        if path == "/finish_weight_update":
            assert body is not None
            assert self.ledger.is_whole
            self.version = body["weight_version"]
        if path == "/collective_rpc" and body == {"method": "held_weights"}:
            return {"results": [{"version": self.version, "crc32": self.ledger.received}]}
        return {"success": self.can_empty_cache}

    def get(self, path: str, seconds: float) -> dict:
        return {"weight_version": self.version}

    def _update(self, info: dict) -> None:
        if self.ledger.version == -1:
            self.ledger = Ledger(info["version"])
        if "manifest" in info:
            self.ledger.settle(Path(info["manifest"]))
            return
        self.before_load()
        path = Path(info["bucket"])
        self.num_files.append(len(list(path.parent.glob("*.safetensors*"))))
        self.weights |= self.ledger.read(path, [Entry.from_json(fields) for fields in info["tensors"]])


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[TransferFolder]:
    made = TransferFolder(tmp_path)
    yield made
    made.close()


def blocks(count: int) -> dict[str, torch.Tensor]:
    """So many tensors of 16 KiB."""
    return {f"layer.{index}": torch.full((4, KIB), float(index)) for index in range(count)}


def test_sender_takes_every_tensor_to_every_server(folder: TransferFolder) -> None:
    """All servers hold the same weights afterwards, in the order pause, update, empty the cache, resume."""
    servers = [Books("http://one"), Books("http://two")]
    sender = BucketSender(servers, folder, 40 * KIB, 5)
    report = sender.send(7, iter(blocks(9).items()))
    assert (report.version, report.failed, report.num_bytes) == (7, {}, 9 * 16 * KIB)
    for server in servers:
        assert {name: float(tensor[0, 0]) for name, tensor in server.weights.items()} == {
            f"layer.{index}": float(index) for index in range(9)
        }
        assert len(server.num_files) == 5  # two tensors of 16 KiB fit 40 KiB
        others = [path for path in server.commands if path not in ("/update_weights", "/collective_rpc")]
        assert others == [
            "/pause?mode=wait", "/start_weight_update", "/finish_weight_update", "/reset_prefix_cache", "/resume"
        ]  # fmt: skip
        assert server.ledger.received == {entry.name: entry.crc32 for entry in sender.manifest}
        assert server.version == "7"
    assert {path.name for path in folder.path.iterdir()} == {"lock", "manifest.json"}


def test_at_most_two_buckets_exist(folder: TransferFolder) -> None:
    """However slowly a server loads, the sender writes one bucket ahead and then waits: at every tensor that it takes and at
    every load there are at most two files, and there are two (it does write ahead)."""
    taken, seen = threading.Event(), []

    def slowly() -> None:
        taken.clear()
        taken.wait(0.2)

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for item in blocks(12).items():
            seen.append(len(list(folder.path.glob("*.safetensors*"))))
            taken.set()
            yield item

    server = Books("http://one")
    server.before_load = slowly
    assert BucketSender([server], folder, 32 * KIB, 5).send(1, stream()).failed == {}
    assert max(seen) == 2
    assert max(server.num_files) == 2


def test_large_tensor_has_a_bucket_of_its_own(folder: TransferFolder) -> None:
    """A tensor above the size of a bucket travels whole, and its neighbours are not lost."""
    weights = {"small": torch.ones(4), "large": torch.ones(64 * KIB), "last": torch.ones(4)}
    server = Books("http://one")
    assert BucketSender([server], folder, 32 * KIB, 5).send(1, iter(weights.items())).failed == {}
    assert {name: len(tensor) for name, tensor in server.weights.items()} == {"small": 4, "large": 65536, "last": 4}


@pytest.mark.parametrize(
    "command",
    [
        "/pause?mode=wait",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/reset_prefix_cache",
        "/resume",
    ],
)
def test_failing_server_does_not_stop_the_others(folder: TransferFolder, command: str) -> None:
    """Whatever a server refuses, it is named, it is asked nothing more (so not resumed), and the other is updated."""
    bad, good = Books("http://bad", refuses_at=command), Books("http://good")
    report = BucketSender([bad, good], folder, 32 * KIB, 5).send(2, iter(blocks(6).items()))
    assert report.failed == {"http://bad": f"http://bad: {command} refused"}
    assert bad.commands[-1] == command
    assert (good.version, len(good.weights)) == ("2", 6)


def test_stale_cache_or_version_is_a_failure(folder: TransferFolder) -> None:
    """A server that keeps its prefix cache, or says another version than was sent, has not been updated."""
    keeps, lies = Books("http://keeps"), Books("http://lies")
    keeps.can_empty_cache = False
    lies.get = lambda path, seconds: {"weight_version": "6"}  # type: ignore[method-assign]
    failed = BucketSender([keeps, lies], folder, 32 * KIB, 5).send(2, iter(blocks(2).items())).failed
    assert "prefix cache holds keys of old weights" in failed["http://keeps"]
    assert "of version 6 after an update to 2" in failed["http://lies"]
    assert "/resume" not in keeps.commands


def test_stream_is_read_to_its_end_when_all_fails(folder: TransferFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream is collective: other ranks wait in it, also when no server is left or the folder is full."""
    stream = iter(blocks(6).items())
    BucketSender([Books("http://bad", refuses_at="/update_weights")], folder, 32 * KIB, 5).send(1, stream)
    assert next(stream, None) is None

    def full(writer: BucketWriter, name: str, tensor: torch.Tensor) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(BucketWriter, "add", full)
    stream = iter(blocks(6).items())
    with pytest.raises(WeightSyncError, match=r"version 1: cannot write to .*No space left on device"):
        BucketSender([Books("http://good")], folder, 32 * KIB, 5).send(1, stream)
    assert next(stream, None) is None
    assert not list(folder.path.glob("*.safetensors*"))


def test_folder_is_private_and_goes_with_its_process(tmp_path: Path) -> None:
    """0700; removed at close and at the end of the process; after a kill the next one removes it, but none that is in use."""
    mine = TransferFolder(tmp_path)
    assert mine.path.stat().st_mode & 0o777 == 0o700
    program = (
        "import sys, time; from pathlib import Path; from oprd_megatron.rollout.vllm.weight_transfer import TransferFolder\n"
        f"print(TransferFolder(Path({str(tmp_path)!r})).path, flush=True); time.sleep(float(sys.argv[1]))"
    )
    ended = subprocess.run([sys.executable, "-c", program, "0"], capture_output=True, text=True, check=True)
    assert not Path(ended.stdout.strip()).exists()
    killed = subprocess.Popen([sys.executable, "-c", program, "600"], stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    left = Path(killed.stdout.readline().strip())
    killed.send_signal(signal.SIGKILL)
    killed.wait(10)
    assert left.exists()
    other = TransferFolder(tmp_path)
    assert not left.exists()
    assert mine.path.exists()
    for made in (mine, other):
        made.close()
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    """The message says what to set."""
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightSyncError, match=r"no folder for weights in .*; set rollout.server.transfer: disk"):
        TransferFolder(tmp_path / "file")
    assert weight_transfer.SHARED_MEMORY.is_dir()
