"""A stand-in for the parts of NeMo-RL that `oprd_megatron.library.nemo_rl` meets, from its source (that module names files and
commits): the enums of its loss interface, a micro-batch, its forward-backward function with what it does to losses."""

from __future__ import annotations

import enum
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func


class LossType(enum.Enum):
    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class LossInputType(enum.Enum):
    LOGIT = "logit"
    LOGPROB = "logprob"


@dataclass
class ProcessedMicrobatch:
    data_dict: dict[str, Any]
    input_ids: torch.Tensor
    input_ids_cp_sharded: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    packed_seq_params: PackedSeqParams | None
    cu_seqlens_padded: torch.Tensor | None


def install() -> None:
    """Make `nemo_rl.algorithms.loss.interfaces` importable in this process."""
    names = ["nemo_rl", "nemo_rl.algorithms", "nemo_rl.algorithms.loss", "nemo_rl.algorithms.loss.interfaces"]
    for name in names:
        sys.modules.setdefault(name, types.ModuleType(name))
    interfaces = sys.modules[names[-1]]
    interfaces.LossType, interfaces.LossInputType = LossType, LossInputType  # type: ignore[attr-defined]


def megatron_forward_backward(
    model: torch.nn.Module,
    data_iterator: Iterator[ProcessedMicrobatch],
    num_microbatches: int,
    seq_length: int,
    mbs: int,
    loss_fn: Any,
    global_valid_seqs: torch.Tensor,
    global_valid_toks: torch.Tensor,
    forward_only: bool = False,
) -> Any:
    """Of `post_processing_fn`, only the loss function is left; LossPostProcessor's arithmetic is all there."""

    def forward_step(
        iterator: Iterator[ProcessedMicrobatch], chunk: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(iterator)
        logits = chunk(
            input_ids=batch.input_ids_cp_sharded, position_ids=batch.position_ids, attention_mask=batch.attention_mask,
            packed_seq_params=batch.packed_seq_params,
        )  # fmt: skip

        def loss_func(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
            loss, metrics = loss_fn(batch.data_dict, global_valid_seqs, global_valid_toks, logits=output)
            return loss * num_microbatches / parallel_state.get_context_parallel_world_size(), metrics

        return logits, loss_func

    return get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=data_iterator, model=model, num_microbatches=num_microbatches,
        seq_length=seq_length, micro_batch_size=mbs, decoder_seq_length=seq_length, forward_only=forward_only,
    )  # fmt: skip
