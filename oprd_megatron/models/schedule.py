"""Run micro-batches through mcore's pipeline schedules: the one place that calls them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from oprd_megatron.models.build import Model, without_head
from oprd_megatron.platform import Platform

OnOutput = Callable[[int, torch.Tensor], torch.Tensor]
"""(micro_batch, last stage's output) -> scalar loss. The output is logits [B, S, V / tp] with the head, else the final
hidden state [S_local, B, D] after the final norm."""


class LossAnchor(torch.autograd.Function):
    """A zero that is connected to the last stage's output, so that the schedule has a loss to start backward from when all
    gradients are injected on the way. Forward and backward: no collectives."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor) -> torch.Tensor:
        ctx.shape, ctx.dtype, ctx.device = output.shape, output.dtype, output.device
        return output.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return torch.zeros((), dtype=ctx.dtype, device=ctx.device).expand(ctx.shape)


def no_output_loss(micro_batch: int, output: torch.Tensor) -> torch.Tensor:
    """The `on_output` of a run without output-space terms."""
    return LossAnchor.apply(output)


def run_schedule(
    model: Model,
    platform: Platform,
    blocks: Sequence[torch.Tensor],
    *,
    forward_only: bool,
    chunks: Sequence[torch.nn.Module] | None = None,
    head: bool = False,
    on_output: OnOutput = no_output_loss,
) -> None:
    """Forward (and backward) over the micro-batches of this data-parallel rank. Collective over the model's pipeline.

    Args:
        model: teacher or student.
        platform: of this run.
        blocks: token ids [B, S] of each micro-batch, right-padded; S may differ between them.
        forward_only: no gradients.
        chunks: the model's chunks as wrapped for training (mcore's DDP); the bare ones if left out.
        head: compute logits. Without it no LM head is called.
        on_output: called on the last stage after each forward.
    """
    if not blocks:
        return
    wrapped = list(chunks if chunks is not None else model.chunks)
    groups = model.grid.groups
    forward_backward = get_forward_backward_func(pp_size=model.grid.layout.pp, vp_size=None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(platform.scope())
        if forward_only:
            stack.enter_context(torch.no_grad())
        forward_backward(
            forward_step_func=_forward_step(on_output, head),
            data_iterator=_numbered(blocks, platform.device),
            model=wrapped,
            num_microbatches=len(blocks),
            seq_length=blocks[0].size(1),
            micro_batch_size=blocks[0].size(0),
            forward_only=forward_only,
            p2p_communicator=P2PCommunicator(groups.pp, model.config),
            pg_collection=groups,
        )


def _numbered(blocks: Sequence[torch.Tensor], device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
    for number, ids in enumerate(blocks):
        yield number, ids.to(device, non_blocking=True)


def _forward_step(on_output: OnOutput, head: bool) -> Callable[..., Any]:
    """mcore's forward step: (output, loss function returning (loss, number of tokens, what to keep)).

    The number of tokens is 1 and is ignored: losses come with their global denominator already applied.
    """

    def forward_step(batches: Iterator[tuple[int, torch.Tensor]], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        number, ids = next(batches)
        positions = torch.arange(ids.size(1), device=ids.device).expand_as(ids)
        with contextlib.nullcontext() if head else without_head(chunk):
            output = chunk(input_ids=ids, position_ids=positions, attention_mask=None)

        def loss_func(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
            return on_output(number, output), torch.ones((), dtype=torch.int, device=output.device), None

        return output, loss_func

    return forward_step
