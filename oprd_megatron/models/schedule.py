"""Run micro-batches through mcore's pipeline schedules: the one place that calls them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from oprd_megatron.models.build import Model, without_head
from oprd_megatron.models.micro_batch import MicroBatch
from oprd_megatron.models.pipeline_p2p import PackP2P
from oprd_megatron.parallel.activity import here
from oprd_megatron.platform import Platform

OnOutput = Callable[[int, torch.Tensor], torch.Tensor]
"""(micro_batch, last stage's output) -> scalar loss. The output is logits [1, P / cp, V / tp] with the head, else the final
hidden state [P_local, 1, D] after the final norm."""


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
    micro_batches: Sequence[MicroBatch],
    *,
    forward_only: bool,
    chunks: Sequence[torch.nn.Module] | None = None,
    head: bool = False,
    on_output: OnOutput = no_output_loss,
    finalize: bool = True,
) -> None:
    """Forward (and backward) over the micro-batches of this data-parallel rank. Collective over the model's pipeline; does
    nothing on ranks without a part of the model.

    Args:
        model: teacher or student.
        platform: of this run.
        micro_batches: of this data- and context-parallel rank, in order; their lengths may differ.
        forward_only: no gradients.
        chunks: the model's chunks as wrapped for training (mcore's DDP); the bare ones if left out.
        head: compute logits. Without it no LM head is called.
        on_output: called on the last stage after each forward.
        finalize: reduce gradients over ranks at the end; False when more micro-batches of the same step follow.
    """
    if not model.grid.is_member:
        return
    wrapped = list(chunks if chunks is not None else model.chunks)
    groups, layout, config = model.grid.groups, model.grid.layout, model.config
    is_interleaved = layout.vpp > 1
    forward_backward = get_forward_backward_func(layout.pp, layout.vpp if is_interleaved else None)
    shards = layout.tp if layout.sp else 1
    lengths = [len(batch.ids) // shards for batch in micro_batches]
    iterators = [iter(micro_batches) for _ in wrapped]
    with contextlib.ExitStack() as stack:
        stack.enter_context(platform.scope())
        if forward_only:
            stack.enter_context(torch.no_grad())
        if not finalize:
            stack.enter_context(_without_finalisation(config))
        forward_backward(
            forward_step_func=_forward_step(on_output, head, platform.device),
            data_iterator=iterators if is_interleaved else iterators[0],
            model=wrapped,
            num_microbatches=len(micro_batches),
            seq_length=len(micro_batches[0].ids),
            micro_batch_size=1,
            forward_only=forward_only,
            p2p_communicator=PackP2P(model.grid, config, lengths),
            pg_collection=groups,
        )


@contextlib.contextmanager
def _without_finalisation(config: TransformerConfig) -> Iterator[None]:
    finalize, config.finalize_model_grads_func = config.finalize_model_grads_func, None
    try:
        yield
    finally:
        config.finalize_model_grads_func = finalize


def _forward_step(on_output: OnOutput, head: bool, device: torch.device) -> Callable[..., Any]:
    """mcore's forward step: (output, loss function returning (loss, number of tokens, what to keep)).

    The number of tokens is 1 and is ignored: losses come with their global denominator already applied.
    """

    def forward_step(batches: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        here.mark()
        batch = next(batches)
        ids = batch.ids.to(device, non_blocking=True).unsqueeze(0)
        positions = torch.arange(ids.size(1), device=device).unsqueeze(
            0
        )  # unused: rotary embeddings follow the packing
        with contextlib.nullcontext() if head else without_head(chunk):
            output = chunk(
                input_ids=ids, position_ids=positions, attention_mask=None, packed_seq_params=batch.packing(device)
            )

        def loss_func(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
            return on_output(batch.number, output), torch.ones((), dtype=torch.int, device=output.device), None

        return output, loss_func

    return forward_step
