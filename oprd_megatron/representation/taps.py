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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

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
    after_norm = final_state == "post_norm" and tapped == "state"
    places = tapped_modules(model.chunks, layers, model.architecture.num_layers if after_norm else None)
    make_hook = _update_hook if tapped == "update" else _hook
    handles = [module.register_forward_hook(make_hook(layer, on_state), with_kwargs=True) for layer, module in places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tapped_modules(
    chunks: Sequence[GPTModel], layers: Iterable[int], normed_layer: int | None
) -> list[tuple[int, torch.nn.Module]]:
    """(layer, module whose output is its state) of those of these layers that live on this rank.

    Args:
        chunks: unwrapped GPTModels.
        layers: 1-based global ids.
        normed_layer: the layer whose state is the one after the final norm; None for none.
    """
    wanted = set(layers)
    return [
        (int(block.layer_number), chunk.decoder if block.layer_number == normed_layer else block)
        for chunk in chunks
        for block in chunk.decoder.layers
        if block.layer_number in wanted
    ]


def _hook(layer: int, on_state: OnState) -> Callable[..., Any]:
    def hook(module: torch.nn.Module, inputs: Any, keywords: dict[str, Any], output: Any) -> Any:
        return with_state(output, lambda hidden: on_state(layer, keywords["packed_seq_params"].micro_batch, hidden))

    return hook


def with_state(output: Any, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
    """A hook's return value: the output of a layer or a block with its hidden state changed, None if it stays."""
    replacement = change(output[0] if isinstance(output, tuple) else output)
    if replacement is None:
        return None
    return (replacement, *output[1:]) if isinstance(output, tuple) else replacement


def _update_hook(layer: int, on_state: OnState) -> Callable[..., None]:
    def hook(module: torch.nn.Module, inputs: Any, keywords: dict[str, Any], output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        before = keywords["hidden_states"] if "hidden_states" in keywords else inputs[0]
        on_state(layer, keywords["packed_seq_params"].micro_batch, after.detach() - before.detach())

    return hook
