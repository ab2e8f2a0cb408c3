"""vLLM servers as one engine of the trainer."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

from oprd_megatron.config.rollout import RolloutConfig
from oprd_megatron.errors import WeightSyncError
from oprd_megatron.rollout.engine import Request, Rollout, SamplingParams
from oprd_megatron.rollout.vllm.client import ServerClient, ServerError
from oprd_megatron.rollout.vllm.fleet import Fleet
from oprd_megatron.rollout.vllm.scoring import score_sequence
from oprd_megatron.rollout.vllm.weight_transfer import Server, SyncReport
from oprd_megatron.rollout.vllm.writing import Writing

logger = logging.getLogger(__name__)

SCORED_AT_ONCE = 16


class WeightSender(Protocol):
    """How weights travel; `weight_transfer.BucketSender` is one."""

    servers: Sequence[Server]
    """Where the next update goes."""

    def send(self, version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> SyncReport:
        """One update of all servers."""
        ...

    def close(self) -> None:
        """Free what updates need."""
        ...


class Stoppable(Protocol):
    """A server that this process started."""

    def stop(self) -> None:
        """End it."""
        ...


class ServerEngine:
    """A `DecodingEngine` on vLLM servers.

    Args:
        clients: one a server; they passed `server_checks`.
        config: `rollout`.
        sender: takes weights to servers.
        processes: servers to stop at `close`.

    Attributes:
        fleet: the servers.
        last_sync: what came of the last update of weights.
        replica: see `RolloutEngine`.
    """

    def __init__(
        self,
        clients: Sequence[ServerClient],
        config: RolloutConfig,
        sender: WeightSender,
        processes: Sequence[Stoppable] = (),
    ) -> None:
        self.fleet = Fleet(clients, config.server, config.timeout_seconds)
        self.last_sync: SyncReport | None = None
        self.replica: int | None = None
        self._sender, self._processes = sender, processes
        self._seconds = config.server.request_seconds
        self._version: int | None = None

    def start(self, requests: list[Request], params: SamplingParams, step: int) -> Writing:
        """See `DecodingEngine.start`.

        Raises:
            WeightSyncError: no weights yet, or the last update failed.
        """
        return self.fleet.start(requests, params, step, self._ready_version())

    def generate(self, requests: list[Request], params: SamplingParams, step: int) -> list[Rollout]:
        """See `RolloutEngine.generate`.

        Raises:
            UserError: no server is left, or a response fails everywhere.
        """
        return self.start(requests, params, step).take()

    def update_weights(self, version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Send weights to all servers that answer, also to those that were set aside; who fails is set aside.

        Args:
            version: of the weights.
            tensors: (Hugging Face name, full tensor), each name once. Read to the end, whatever happens.

        Raises:
            WeightSyncError: responses are being written.
            UserError: no server took them.
        """
        self._version = None
        try:
            if self.fleet.is_writing:
                raise WeightSyncError(
                    f"weight sync of version {version}: responses of the version before are still being written; take all first"
                )
            clients = self.fleet.revive()
            self._sender.servers = list(clients)
            self.last_sync = self._sender.send(version, tensors)
        finally:
            for _ in tensors:
                pass
        failed = self.last_sync.failed
        for url, reason in failed.items():
            logger.warning("weight sync of version %d: %s gets no more requests: %s", version, url, reason)
        self.fleet.keep([client for client in clients if client.url not in failed], failed)
        self._version = version

    def score(self, token_ids: list[list[int]]) -> list[torch.Tensor]:
        """See `RolloutEngine.score`: by the first server in use. `score_each` asks all."""
        self._ready_version()
        return self._score(self.fleet.alive[:1], token_ids)[0]

    def score_each(self, token_ids: list[list[int]]) -> dict[str, list[torch.Tensor]]:
        """`score` by every server in use, by url: each of them must hold the weights."""
        self._ready_version()
        clients = self.fleet.alive
        return dict(zip([client.url for client in clients], self._score(clients, token_ids), strict=True))

    def checksums(self) -> dict[str, dict[str, int]]:
        """See `RolloutEngine.checksums`: by worker of each server in use. Servers whose weights come by NCCL cannot say."""
        found = {}
        for client in self.fleet.alive:
            try:
                reply = client.post("/collective_rpc", {"method": "held_weights"}, self._seconds)
            except ServerError as error:
                logger.warning("no checksums of weights: %s", error)
                continue
            for number, held in enumerate(reply["results"]):
                found[f"{client.url} worker {number}"] = held["crc32"]
        return found

    def close(self) -> None:
        """Stop what is being written, and the servers that this process started."""
        self._version = None
        self.fleet.close()
        self._sender.close()
        for process in self._processes:
            process.stop()

    def _score(self, clients: Sequence[ServerClient], token_ids: list[list[int]]) -> list[list[torch.Tensor]]:
        """By client, then by sequence."""
        with ThreadPoolExecutor(SCORED_AT_ONCE, thread_name_prefix="scores") as pool:
            scored = [
                [pool.submit(score_sequence, client, ids, self._seconds) for ids in token_ids] for client in clients
            ]
            return [[future.result() for future in futures] for futures in scored]

    def _ready_version(self) -> int:
        if self._version is None:
            raise WeightSyncError("the servers have no weights, or the last update failed; call update_weights first")
        return self._version
