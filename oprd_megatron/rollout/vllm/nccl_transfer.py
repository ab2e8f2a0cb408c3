"""The student's weights into vLLM servers between GPUs, by vLLM's own NCCL weight transfer. Not yet run on a GPU.

vLLM must be importable here, and the servers be started with the weight transfer backend `nccl`. The sender is rank 0 of a
group with all workers of all servers. A server that fails leaves the others waiting in a broadcast, so here, unlike with
buckets, a failure ends the update of all. There are no checksums; the probe after the update is the proof.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from checkpoints_conversion import Architecture, mappings_for
from oprd_megatron.errors import UserError, WeightSyncError
from oprd_megatron.rollout.vllm.weight_transfer import Round, Server, SyncReport


class NCCLSender:
    """Sends updates to servers between GPUs.

    Args:
        servers: where to, as long as this lives.
        architecture: the student's.
        dtype: what weights travel in.
        address: of this machine, for the servers' workers to meet at.
        port: free here.
        seconds: longest wait for one command at one server.

    Raises:
        WeightSyncError: torch sees no GPU, or a server does not join.
        UserError: vLLM is not installed here.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        architecture: Architecture,
        dtype: torch.dtype,
        address: str,
        port: int,
        seconds: float,
    ) -> None:
        if not torch.cuda.is_available():
            raise WeightSyncError(
                "rollout.server.transfer: nccl needs GPUs and torch sees none here; set transfer: auto"
            )
        try:
            from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        except ImportError:
            raise UserError(
                "rollout.server.transfer: nccl uses vLLM in the run's own environment, and it is not there; install "
                "oprd-megatron[vllm], or set transfer: disk"
            ) from None
        self.servers, self.seconds = servers, seconds
        self._source, self._client = _Source(architecture, dtype), _AllServers(servers, seconds)
        info = NCCLTrainerInitInfo(address, port, 1 + sum(self._client.world_sizes), rank=0)
        self._engine = WeightTransferTrainerFactory.trainer_init(info, client=self._client, source=self._source)

    def send(self, version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> SyncReport:
        """One update.

        Args:
            version: of the weights.
            tensors: (Hugging Face name, full tensor on this GPU), in the order of the mappings. Read to the end.

        Raises:
            WeightSyncError: a server failed.
        """
        try:
            if list(self.servers) != list(self._client.servers):
                raise WeightSyncError(
                    f"weight sync of version {version}: a server has left, and NCCL's group cannot do without it; start the "
                    "run again, or set rollout.server.transfer: disk"
                )
            with ThreadPoolExecutor(len(self.servers), thread_name_prefix="weights") as pool:
                update = Round(self.servers, version, self.seconds, pool)
                update.pause()
                _check(update)
                update.clock("pause")
                self._source.tensors, self._client.version = tensors, version
                self._engine.send_weights()
                update.clock("load")
                update.resume()
                _check(update)
                update.clock("finish")
                return SyncReport(version, {}, self._source.num_bytes, update.spent)
        finally:
            for _ in tensors:
                pass

    def close(self) -> None:
        """Leave the group."""
        self._engine.shutdown()


class _Source:
    """A vLLM `WeightSource` (by its methods) over one pass of the student's stream."""

    def __init__(self, architecture: Architecture, dtype: torch.dtype) -> None:
        from vllm.distributed.weight_transfer import ParamMeta

        self.dtype = dtype
        self.tensors: Iterator[tuple[str, torch.Tensor]] = iter(())
        table = [row for row in mappings_for(architecture).values() if row.exported]
        self._metadata = [ParamMeta(name, dtype, shape) for row in table for name, shape in row.hf_shapes.items()]
        self.num_bytes = sum(torch.Size(meta.shape).numel() for meta in self._metadata) * dtype.itemsize

    def metadata(self) -> list[Any]:
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, tensor.to(self.dtype)) for name, tensor in self.tensors)


class _AllServers:
    """A vLLM `VLLMWeightSyncClient` (by its methods) for several servers: each one's workers come after those before."""

    def __init__(self, servers: Sequence[Server], seconds: float) -> None:
        self.servers, self.seconds, self.version = servers, seconds, 0
        self.world_sizes = [int(server.get("/get_world_size", seconds)["world_size"]) for server in servers]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        bodies, offset = [], init_info["rank_offset"]
        for size in self.world_sizes:
            bodies.append({"init_info": init_info | {"rank_offset": offset}})
            offset += size
        self._post("/init_weight_transfer_engine", bodies)

    def start_weight_update(self) -> None:
        self._post("/start_weight_update", [None] * len(self.servers))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._post("/update_weights", [{"update_info": update_info}] * len(self.servers))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("/finish_weight_update", [{"weight_version": str(self.version)}] * len(self.servers))

    def _post(self, path: str, bodies: Sequence[dict | None]) -> None:
        with ThreadPoolExecutor(len(self.servers)) as pool:
            list(pool.map(lambda server, body: server.post(path, body, self.seconds), self.servers, bodies))


def _check(update: Round) -> None:
    if update.failed:
        raise WeightSyncError(f"weight sync of version {update.version}: {next(iter(update.failed.values()))}")
