"""Megatron-LM's loops: a forward step that trains by hidden states alone, and a way into `pretrain`, which builds its model.

Its side, NVIDIA/Megatron-LM: pretrain_gpt.py at 000ab9d6 (forward_step and loss_func); megatron/training/training.py at
001b00c2 (train_step calls the schedule by keyword, and averages one-element metrics over micro-batches).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from oprd_megatron.library.attach import Attachment, Read
from oprd_megatron.library.batches import megatron_batch
from oprd_megatron.models.build import without_head
from oprd_megatron.models.schedule import LossAnchor

GetInputs = Callable[[Iterator[Any]], dict[str, Any]]
"""(data iterator, None where the loop has none) -> arguments of GPTModel.forward, cut for this context-parallel rank."""
ForwardStep = Callable[[Iterator[Any], torch.nn.Module], tuple[torch.Tensor, Callable[..., Any]]]


def representation_step(oprd: Attachment, get_inputs: GetInputs) -> ForwardStep:
    """Megatron-LM's pair: forward_step(data_iterator, model) -> (output_tensor, loss_func), and loss_func(output_tensor) ->
    (loss, num_tokens, metrics).

    The loss is a zero that is connected to the output, so that the schedule has something to go backward from; the number of
    tokens is that of the supervised ones. The value of the loss is in `Attachment.report` after the step, and `around` puts it
    into the metrics as "oprd loss".

    An untied head gets no gradient: freeze `output_layer.weight` before DDP wraps the model, or do without overlap_grad_reduce.
    """
    oprd.trains_alone = True

    def forward_step(data_iterator: Iterator[Any], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        inputs = get_inputs(data_iterator)
        with without_head(model):
            output = model(**inputs)
        return output, loss_func

    def loss_func(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        count = torch.tensor(oprd.next_supervised_tokens(), dtype=torch.int, device=output.device)
        return LossAnchor.apply(output), count, {"supervised tokens": count.view(1).float()}

    return forward_step


def schedules_with_teacher(
    get_forward_backward_func: Callable[..., Any],
    make: Callable[[Any], Attachment],
    read: Read = megatron_batch,
    divides: bool = True,
) -> Callable[..., Any]:
    """A `get_forward_backward_func` whose schedules have a teacher in front of them, for a loop that builds its model itself.

    Args:
        get_forward_backward_func: mcore's.
        make: attaches to the model, which is what the schedule is given; called once, before the first step.
        read, divides: as for `Attachment.around`.
    """
    made: list[Attachment] = []

    def get(*arguments: Any, **keywords: Any) -> Callable[..., Any]:
        schedule = get_forward_backward_func(*arguments, **keywords)

        def run(*, model: Any, **call: Any) -> Any:
            if not made:
                made.append(make(model))
            return made[0].around(schedule, read, divides)(model=model, **call)

        return run

    return get
