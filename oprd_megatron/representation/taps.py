"""Taps: read, or change, the hidden state of chosen layers while mcore's schedule runs.

A tap is a forward hook on a `TransformerLayer` (whose `layer_number` is global and 1-based also under pipeline
parallelism) or, for the state after the final norm, on the `TransformerBlock` of the last stage. Never on sub-norms:
in the Transformer Engine spec they are fused into the linear layers. The hook reads the micro-batch's number from the
packing that every layer is called with, so it is right also when a layer is recomputed in backward.

The state of layer l < L is the residual stream after block l, as in Hugging Face's hidden_states[l]; for l = L it is the
state after the final norm (`post_norm`, Hugging Face's convention) or before it (`pre_norm`).

The update of a layer is what its block adds: its output less its input, on the same rank at every layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch

from oprd_megatron.models import Model

Tapped = Literal["state", "update"]
OnState = Callable[[int, int, torch.Tensor], torch.Tensor | None]
"""(layer, micro_batch, hidden [P_local, 1, D]) -> a replacement for the hidden state, or None to leave it."""


@contextlib.contextmanager
def attached_taps(
    model: Model,
    layers: Iterable[int],
    final_state: Literal["post_norm", "pre_norm"],
    on_state: OnState,
    tapped: Tapped = "state",
) -> Iterator[None]:
    """Within the block, call `on_state` with the hidden state of each of these layers that lives on this rank.

    Args:
        model: teacher or student.
        layers: 1-based global ids.
        final_state: which state stands for the last layer.
        on_state: called on every forward of every micro-batch; under recomputation also when a layer is recomputed.
        tapped: the state after a layer, or what its block added to it (`final_state` then does not matter).
    """
    wanted, handles = set(layers), []
    for chunk in model.chunks:
        for block in chunk.decoder.layers:
            number = int(block.layer_number)
            if number not in wanted:
                continue
            if tapped == "update":
                hook = _update_hook(number, on_state)
                handles.append(block.register_forward_hook(hook, with_kwargs=True))
                continue
            after_norm = number == model.architecture.num_layers and final_state == "post_norm"
            module = chunk.decoder if after_norm else block
            handles.append(module.register_forward_hook(_hook(number, on_state), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(layer: int, on_state: OnState) -> Callable[..., Any]:
    def hook(module: torch.nn.Module, inputs: Any, keywords: dict[str, Any], output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        replacement = on_state(layer, keywords["packed_seq_params"].micro_batch, hidden)
        if replacement is None:
            return None
        return (replacement, *output[1:]) if isinstance(output, tuple) else replacement

    return hook


def _update_hook(layer: int, on_state: OnState) -> Callable[..., None]:
    def hook(module: torch.nn.Module, inputs: Any, keywords: dict[str, Any], output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        before = keywords["hidden_states"] if "hidden_states" in keywords else inputs[0]
        on_state(layer, keywords["packed_seq_params"].micro_batch, after.detach() - before.detach())

    return hook
