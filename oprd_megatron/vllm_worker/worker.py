"""The receiving side of weight updates, inside vLLM.

vLLM imports this module in every worker, because a server names `WorkerExtension` as its worker extension; that registers the
weight transfer backend `BACKEND`. An update is: start, one request for each bucket, one for the manifest, finish. Each request
is a dict of `UpdateInfo`'s fields.

From start to finish, and after an update that failed, the model gives no logits: a request that is served nevertheless ends the
engine with an error, rather than being answered by weights of two versions. The next whole update makes it serve again.

What vLLM's own reload gets wrong on CPU is mended here (see `_pack_heads`, `_pack_experts` and `update_weights`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from oprd_megatron.errors import WeightSyncError
from oprd_megatron.vllm_worker.buckets import BACKEND, Entry, Ledger
from oprd_megatron.vllm_worker.watch import SERVER_PID, die_with

LOGITS = ("compute_logits", "compute_logits_local")
"""Methods of a model that all text passes through, outside of CUDA graphs; not every model has the second."""


@dataclass
class InitInfo(WeightTransferInitInfo):
    """There is nothing to agree on beforehand."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One request of an update: a bucket, or at the end the manifest."""

    version: int
    bucket: str | None = None
    """Path of a bucket."""
    tensors: list[dict[str, Any]] = field(default_factory=list)
    """Its entries."""
    manifest: str | None = None
    """Path of the manifest."""


class BucketTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads buckets into this worker's part of the model.

    Attributes:
        held: version and {name: crc32} of the last whole update; None before the first and after a failed one.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    held: tuple[int, dict[str, int]] | None = None
    _ledger: Ledger | None = None
    _is_loading = False

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass

    def shutdown(self) -> None:
        pass

    def start_weight_update(self) -> None:
        """Make the model ready for new weights; it gives no logits until they are all there."""
        self.abandon()
        self.held = None
        self._refuse_logits()
        initialize_layerwise_reload(self.model)
        self._is_loading = True

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """One request. The base class synchronises with an accelerator, which fails where there is none."""
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except BaseException:
            self.abandon()
            raise
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load a bucket, or settle the account.

        Raises:
            WeightSyncError: the bucket, or the update as a whole, is not what was announced.
        """
        if self._ledger is None:
            self._ledger = Ledger(update_info.version)
        if self._ledger.version != update_info.version:
            raise WeightSyncError(
                f"weight update: a bucket of version {update_info.version} within update {self._ledger.version}"
            )
        if update_info.bucket is not None:
            entries = [Entry.from_json(fields) for fields in update_info.tensors]
            with disable_mtp_completeness_check():
                self.model.load_weights(self._ledger.read(Path(update_info.bucket), entries))
        if update_info.manifest is not None:
            self._ledger.settle(Path(update_info.manifest))
            self._check_filled(self._ledger.version)

    def load_stream(self, version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """A whole update at once, of tensors in this process's memory.

        Args:
            version: of the weights.
            tensors: (Hugging Face name, full tensor), each name once.

        Raises:
            WeightSyncError: a name came twice, or a layer did not get all its weights.
        """
        self.start_weight_update()
        self._ledger = Ledger(version)
        try:
            with disable_mtp_completeness_check():
                self.model.load_weights(self._ledger.noted(tensors))
            self._check_filled(version)
        except BaseException:
            self.abandon()
            raise
        self._ledger.is_whole = True
        self.finish_weight_update()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def finish_weight_update(self) -> None:
        """Put the new weights to use.

        Raises:
            WeightSyncError: the manifest has not come, so nobody knows whether they are all here.
        """
        ledger = self._ledger
        if ledger is None or not ledger.is_whole:
            self.abandon()
            raise WeightSyncError("weight update: finished without a manifest; send it after the last bucket")
        finalize_layerwise_reload(self.model, self.model_config)
        self._is_loading, self._ledger = False, None
        self._pack_heads()
        self._pack_experts()
        for name in LOGITS:
            self.model.__dict__.pop(name, None)
        self.held = (ledger.version, ledger.received)

    def abandon(self) -> None:
        """Take the model out of an update that will not be finished, so that the next can start. Weights may be of two versions
        afterwards, and the model goes on giving no logits."""
        self._ledger = None
        if not self._is_loading:
            return
        for layer in self.model.modules():
            info = get_layerwise_info(layer)
            if info.can_load():  # as if nothing had come for it: its old tensors are put back
                info.load_numel = 0
                info.loaded_weights.clear()
        finalize_layerwise_reload(self.model, self.model_config)
        self._is_loading = False

    def _check_filled(self, version: int) -> None:
        """Every layer has got all its weights.

        Raises:
            WeightSyncError: it names the first layer that has not.
        """
        for name, layer in self.model.named_modules():
            info = get_layerwise_info(layer)
            has_weights = any(True for _ in layer.parameters(recurse=False))
            if not info.can_load() or is_deferred_attention_layer(layer) or not has_weights:
                continue
            if isinstance(layer, ParallelLMHead) and self._is_tied(layer):
                continue
            # the vocabulary is padded, so an embedding never gets all its elements
            if info.load_numel == 0 or not isinstance(layer, VocabParallelEmbedding):
                raise WeightSyncError(
                    f"weight update {version}: layer {name!r} got {info.load_numel} of "
                    f"{info.load_numel_total} elements; the trainer sent too few tensors"
                )

    def _is_tied(self, head: ParallelLMHead) -> bool:
        """Whether the head's weight is an embedding's."""
        held = get_layerwise_info(head).kernel_tensors
        weight = (held[0] if held is not None else dict(head.named_parameters()))["weight"]
        for layer in self.model.modules():
            if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
                kept = get_layerwise_info(layer).kernel_tensors
                if weight is (kept[0]["weight"] if kept is not None else layer.weight):
                    return True
        return False

    def _pack_heads(self) -> None:
        """On CPU a head multiplies by a packed copy of its weight. A head of its own is packed by the reload; one that is tied
        to the embedding gets nothing in the reload and keeps the copy of the old weights."""
        for layer in self.model.modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)

    def _pack_experts(self) -> None:
        """On CPU experts are packed when they are first loaded. A reload leaves them unpacked, where the kernel reads packed
        ones."""
        for layer in self.model.modules():
            method = getattr(layer, "quant_method", None)
            if self.device.type != "cpu" or not isinstance(method, UnquantizedFusedMoEMethod):
                continue
            kept = dict(layer.named_parameters(recurse=False))
            method.moe_kernel.fused_experts.process_weights_after_loading(layer)
            for name, parameter in kept.items():  # compiled code may know these
                parameter.data.copy_(getattr(layer, name))
                layer.register_parameter(name, parameter)

    def _refuse_logits(self) -> None:
        def refuse(*args: Any, **kwargs: Any) -> torch.Tensor:
            raise WeightSyncError(
                "the engine's weights are of two versions: an update is on its way or has failed, and text was asked for"
            )

        for name in LOGITS:
            if hasattr(self.model, name):
                self.model.__dict__[name] = refuse


class WorkerExtension:
    """Methods that vLLM adds to its worker, called over `/collective_rpc`."""

    weight_transfer_engine: BucketTransferEngine
    _weight_update_active: bool

    def held_weights(self) -> dict[str, Any]:
        """`{"version": int | None, "crc32": {name: int}}` of the weights that were received last."""
        version, checksums = self.weight_transfer_engine.held or (None, {})
        return {"version": version, "crc32": checksums}

    def abandon_weight_update(self) -> None:
        """Forget an update that was begun and not finished, by a trainer that is gone; vLLM lets no other one begin before."""
        self.weight_transfer_engine.abandon()
        self._weight_update_active = False


WeightTransferEngineFactory.register_engine(BACKEND, BucketTransferEngine)
if SERVER_PID in os.environ:
    die_with(int(os.environ[SERVER_PID]))
