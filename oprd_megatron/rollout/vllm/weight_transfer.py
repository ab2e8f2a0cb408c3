"""The student's weights into vLLM servers, through files: in shared memory on one machine, else in a directory that all see.

A bucket is written while the servers load the one before; when all have loaded one it is deleted. So at most two exist, and the
tensor in hand. The servers are paused meanwhile: what they were writing is finished first, with the weights that it was begun
with, and their prefix caches, which hold keys and values of the old weights, are emptied before they go on.

The stream of tensors is collective over the student's ranks, so it is read to its end whatever happens here.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from oprd_megatron.errors import UserError, WeightSyncError
from oprd_megatron.vllm_worker.buckets import BucketWriter, Entry, write_manifest

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "oprd-weights-"


class Server(Protocol):
    """A vLLM server that answers to commands; `post` and `get` raise `UserError` after `seconds`, or if it refuses."""

    url: str

    def post(self, path: str, body: dict | None, seconds: float) -> dict: ...

    def get(self, path: str, seconds: float) -> dict: ...


@dataclass(frozen=True)
class SyncReport:
    """One update of all servers."""

    version: int
    failed: dict[str, str]
    """Why, by url. Such a server has no weights to write with until an update succeeds, and stays paused."""
    num_bytes: int
    """Of all tensors."""
    seconds: dict[str, float]
    """pause: until what was being written is done. gather: tensors from the student and into buckets. load: waiting for servers
    to load, beyond that. finish: manifest, packing, caches."""


class TransferFolder:
    """A folder of this process for buckets, 0700, removed at `close` and at the process's end. What a killed process left
    beside it is removed when it is made.

    Args:
        parent: `SHARED_MEMORY`, or a directory that all servers see.

    Raises:
        WeightSyncError: it cannot be made.
    """

    def __init__(self, parent: Path) -> None:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(parent)
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            self._lock = (self.path / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:
            raise WeightSyncError(
                f"weight sync: no folder for weights in {parent} ({error.strerror}); set rollout.server.transfer: disk and "
                "transfer_dir"
            ) from None
        atexit.register(self.close)

    def close(self) -> None:
        """Remove it and all in it."""
        atexit.unregister(self.close)
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


class BucketSender:
    """Sends updates to servers whose worker is `oprd_megatron.vllm_worker`.

    Args:
        servers: where to; a server that is gone may be taken out of the list between updates.
        folder: where buckets go.
        bucket_bytes: tensors of a bucket; a larger tensor has one of its own.
        seconds: longest wait for one command at one server, the pause included.
    """

    def __init__(self, servers: Sequence[Server], folder: TransferFolder, bucket_bytes: int, seconds: float) -> None:
        self.servers, self.folder, self.bucket_bytes, self.seconds = servers, folder, bucket_bytes, seconds
        self.manifest: list[Entry] = []
        """Tensors of the last update."""

    def send(self, version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> SyncReport:
        """One update.

        Args:
            version: of the weights; the servers put it on what they write from then on.
            tensors: (Hugging Face name, full tensor of any device), each name once. Read to the end.

        Returns:
            What came of it. A server that fails does not stop the others.

        Raises:
            WeightSyncError: a bucket cannot be written.
        """
        try:
            with ThreadPoolExecutor(max(1, len(self.servers)), thread_name_prefix="weights") as pool:
                update = _BucketRound(self, version, pool)
                report = update.run(tensors)
                self.manifest = update.entries
                return report
        except OSError as error:
            raise WeightSyncError(
                f"weight sync of version {version}: cannot write to {self.folder.path} ({error.strerror}); make room for two "
                "buckets, or set rollout.server.bucket_bytes lower"
            ) from None
        finally:
            for _ in tensors:
                pass
            for path in self.folder.path.glob("*.safetensors*"):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the folder."""
        self.folder.close()


class Round:
    """One update at all servers that have not failed in it.

    Args:
        servers: where to.
        version: of the weights.
        seconds: longest wait for one command at one server.
        pool: a thread for each server.

    Attributes:
        active: servers that have not failed.
        failed: why the others have, by url.
        spent: seconds of each part so far.
    """

    def __init__(self, servers: Sequence[Server], version: int, seconds: float, pool: ThreadPoolExecutor) -> None:
        self.version, self.seconds, self.pool = version, seconds, pool
        self.active = list(servers)
        self.failed: dict[str, str] = {}
        self.spent = dict.fromkeys(("pause", "gather", "load", "finish"), 0.0)
        self._mark = time.perf_counter()

    def pause(self) -> None:
        """Let the servers end what they write, and hold back the rest."""
        self.post("/pause?mode=wait")

    def resume(self) -> None:
        """Empty the caches, go on, and see that the version is the new one."""
        self.each(self._reset_cache)
        self.post("/resume")
        self.each(self._check_version)

    def post(self, path: str, body: dict | None = None) -> None:
        """One command at all servers; wait for all."""
        self.each(lambda server: server.post(path, body, self.seconds))

    def each(self, call: Callable[[Server], Any]) -> None:
        """At all servers at the same time; wait for all."""
        self.collect(self.submit(call))

    def submit(self, call: Callable[[Server], Any]) -> dict[Server, Future]:
        """Begin at all servers."""
        return {server: self.pool.submit(call, server) for server in self.active}

    def collect(self, futures: dict[Server, Future]) -> None:
        """Wait for all; a server that has failed is asked nothing more."""
        for server, future in futures.items():
            error = future.exception()
            if isinstance(error, UserError):
                self.failed[server.url] = str(error)
                self.active.remove(server)
            elif error is not None:
                raise error

    def clock(self, part: str) -> None:
        """The time since the last call was for this part."""
        now = time.perf_counter()
        self.spent[part] += now - self._mark
        self._mark = now

    def _reset_cache(self, server: Server) -> None:
        if not server.post("/reset_prefix_cache", None, self.seconds)["success"]:
            raise WeightSyncError(
                f"{server.url}: its prefix cache holds keys of old weights and cannot be emptied; start it anew"
            )

    def _check_version(self, server: Server) -> None:
        said = server.get("/weight_info", self.seconds)["weight_version"]
        if said != str(self.version):
            raise WeightSyncError(
                f"{server.url}: says that its weights are of version {said} after an update to {self.version}; does another "
                "run use this server?"
            )


class _BucketRound(Round):
    """One update through buckets."""

    def __init__(self, sender: BucketSender, version: int, pool: ThreadPoolExecutor) -> None:
        super().__init__(sender.servers, version, sender.seconds, pool)
        self.folder, self.bucket_bytes = sender.folder.path, sender.bucket_bytes
        self.entries: list[Entry] = []
        self.num_bytes = self.num_buckets = 0
        self._loading: tuple[Path, dict[Server, Future]] | None = None

    def run(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> SyncReport:
        self.pause()
        self.post("/collective_rpc", {"method": "abandon_weight_update"})
        self.post("/start_weight_update")
        self.clock("pause")
        self._send_buckets(tensors)
        manifest = write_manifest(self.folder, self.version, self.entries)
        self.post("/update_weights", _message(version=self.version, manifest=str(manifest)))
        self.post("/finish_weight_update", {"weight_version": str(self.version)})
        self.resume()
        self.clock("finish")
        return SyncReport(self.version, self.failed, self.num_bytes, self.spent)

    def _send_buckets(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        writer: BucketWriter | None = None
        for name, tensor in tensors:
            if writer is not None and not writer.fits(name, tensor):
                self._hand_over(writer)
                writer = None
            writer = writer or self._next_writer()
            writer.add(name, tensor)
            self.num_bytes += tensor.nbytes
        if writer is not None:
            self._hand_over(writer)
        self._wait_loaded()

    def _next_writer(self) -> BucketWriter:
        self.num_buckets += 1
        return BucketWriter(self.folder / f"v{self.version}-{self.num_buckets:05}.safetensors", self.bucket_bytes)

    def _hand_over(self, writer: BucketWriter) -> None:
        """Close a bucket and, when the servers have loaded the one before, let them load it."""
        writer.close()
        self.entries += writer.entries
        self._wait_loaded()
        tensors = [asdict(entry) for entry in writer.entries]
        body = _message(version=self.version, bucket=str(writer.path), tensors=tensors)
        self._loading = writer.path, self.submit(lambda server: server.post("/update_weights", body, self.seconds))

    def _wait_loaded(self) -> None:
        self.clock("gather")
        if self._loading is not None:
            path, futures = self._loading
            self.collect(futures)
            path.unlink()
            self._loading = None
        self.clock("load")


def _message(**fields: Any) -> dict:
    return {"update_info": fields}


def _remove_abandoned(parent: Path) -> None:
    """Folders that no living process has locked, of this user."""
    for folder in parent.glob(PREFIX + "*"):
        if folder.stat().st_uid != os.getuid() or not (folder / "lock").exists():
            continue
        with (folder / "lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(folder, ignore_errors=True)
