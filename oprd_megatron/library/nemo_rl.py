"""OPRD inside NeMo-RL's Megatron policy worker.

NeMo-RL's loss functions see logits on the last pipeline stage; hidden states are on all of them. So there are two parts:

    around_nemo_rl        goes around `megatron_forward_backward`, asks the teacher, and injects the gradients by the hooks
    RepresentationLoss    a `LossFunction` that is 0, for training by hidden states alone; any other of NeMo-RL's losses stays
                          as it is and adds its own gradients

Written from, and tested against a stand-in of, NVIDIA-NeMo/RL (it needs Ray, a GPU and Transformer Engine, and does not install
here):
    nemo_rl/algorithms/loss/interfaces.py   at 002cdc27   LossFunction, LossType, LossInputType
    nemo_rl/models/megatron/train.py        at 002cdc27   megatron_forward_backward, LossPostProcessor: losses arrive divided by
                                                          global counts, and the schedule's x cp / micro-batches is undone
    nemo_rl/models/megatron/data.py         at 03017864   ProcessedMicrobatch; packs and their padded cu_seqlens
NeMo-RL sets calculate_per_token_loss, and its loss functions return (loss, metrics): gradients are added up over ranks and
divided by nothing, the third line of the table in `attach.py`. Its split training API, which rescales gradients once a step, is
not supported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType

from oprd_megatron.library.attach import Attachment
from oprd_megatron.library.batches import TokenBatch
from oprd_megatron.models.schedule import LossAnchor

STATES = "oprd_states"
"""Column of a batch with the teacher's states, for `StatesInBatch`: [B, S, layers, C], layers ascending."""


class RepresentationLoss:
    """A `LossFunction` that is 0: the gradients come from the hooks, its value from `around_nemo_rl` as "oprd_loss"."""

    loss_type = LossType.TOKEN_LEVEL
    input_type = LossInputType.LOGIT

    def __call__(
        self, data: Any, global_valid_seqs: torch.Tensor, global_valid_toks: torch.Tensor, logits: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """NeMo-RL's call: (loss, metrics)."""
        return LossAnchor.apply(logits), {"loss": 0.0, "num_valid_samples": float(data["sample_mask"].sum())}


def around_nemo_rl(oprd: Attachment, megatron_forward_backward: Callable[..., Any]) -> Callable[..., Any]:
    """NeMo-RL's function with the teacher in front of it; same arguments (by keyword), same result.

    Each micro-batch's metrics get "oprd_loss": its share, such that NeMo-RL's sum over micro-batches and data-parallel ranks is
    the loss of the step.
    """
    run = oprd.around(megatron_forward_backward, lambda processed: nemo_rl_batch(oprd, processed), divides=False)

    def around(*, forward_only: bool = False, **arguments: Any) -> Any:
        results = run(forward_only=forward_only, **arguments)
        for metrics in () if forward_only else results:
            metrics["oprd_loss"] = metrics.pop("oprd loss").item() / (len(results) * oprd.grid.layout.dp)
        return results

    return around


def nemo_rl_batch(oprd: Attachment, processed: Any) -> TokenBatch:
    """A `ProcessedMicrobatch` of NeMo-RL.

    `token_mask` marks the tokens themselves (not the positions that predict them), `sample_mask` whole samples. A sequence's
    states come from its row of the column `STATES`, if there is one.
    """
    data, packing = processed.data_dict, processed.packed_seq_params
    taught = torch.as_tensor(data["token_mask"]) * torch.as_tensor(data["sample_mask"])[:, None]
    ids, responses = list(np.asarray(data["input_ids"].cpu(), dtype=np.int64)), list(np.asarray(taught.cpu()) != 0)
    boundaries = None
    if packing is not None:
        bounds = packing.cu_seqlens_q if processed.cu_seqlens_padded is None else processed.cu_seqlens_padded
        boundaries = tuple(int(bound) for bound in bounds)
        lengths = [int(length) for length in data["input_lengths"]]
        ids, responses = (
            [row[:length] for row, length in zip(rows, lengths, strict=True)] for rows in (ids, responses)
        )
    batch = TokenBatch(tuple(ids), tuple(responses), boundaries=boundaries)
    if STATES not in data:
        return batch
    layers = sorted({pair.teacher_layer for pair in oprd.pairs})
    places = batch.positions(oprd.distill)
    rows = torch.cat([data[STATES][number, torch.from_numpy(where)].cpu() for number, where in enumerate(places)])
    states = {layer: rows[:, number] for number, layer in enumerate(layers)}
    return TokenBatch(batch.sequences, batch.responses, boundaries=boundaries, states=states)
