"""A Hugging Face model computed by transformers' own modules, a layer's weights at a time."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from checkpoints_conversion.architecture import Architecture
from checkpoints_conversion.families.experts import EXPERT_NAMES
from checkpoints_conversion.verify.sides import Side
from checkpoints_conversion.verify.streaming import (
    OnState,
    StreamedHead,
    Weights,
    capture,
    lend_rows,
    lend_weights,
)

_EMBEDDING = "model.embed_tokens.weight"
_FUSED_EXPERTS = re.compile(r"(?P<layer>model\.layers\.\d+)\.mlp\.experts\.(?P<kind>gate_up_proj|down_proj)")
_ROUTER = re.compile(r"(?P<layer>model\.layers\.\d+)\.mlp\.gate\.weight")
"""What transformers calls in memory what files hold under other names, or one expert at a time."""


@torch.no_grad()
def run_transformers(
    side: Side,
    weights: Weights,
    batches: Sequence[Tensor],
    positions: Sequence[Tensor],
    dtype: torch.dtype,
    on_state: OnState,
) -> None:
    """Report the states after every unit of the model, batch by batch.

    Args:
        side: a Hugging Face model.
        weights: its tensors.
        batches: token ids [B, T].
        positions: for each batch, which of its B * T tokens get logits.
        dtype: of the computation.
        on_state: see `OnState`.
    """
    model = _build(side, dtype)
    num_layers, decoder = side.arch.num_layers, model.model
    lend_rows(decoder.embed_tokens, _EMBEDDING, weights, dtype)
    capture(decoder.embed_tokens, 0, on_state)
    for index, layer in enumerate(decoder.layers):
        fill = functools.partial(_fill, f"model.layers.{index}", side.arch, weights)
        lend_weights(layer, fill, dtype)
        capture(layer, index + 1, on_state)
    lend_weights(decoder.norm, functools.partial(_fill, "model.norm", side.arch, weights), dtype)
    capture(decoder.norm, num_layers + 1, on_state)
    name = _EMBEDDING if side.arch.tie_word_embeddings else "lm_head.weight"
    on_logits = functools.partial(on_state, num_layers + 2)
    head = StreamedHead(model.lm_head, name, side.arch.vocab_size, weights, dtype, on_logits)
    model.lm_head = head
    for ids, chosen in zip(batches, positions, strict=True):
        head.positions = chosen
        model(input_ids=ids, use_cache=False)


def _build(side: Side, dtype: torch.dtype) -> Any:
    """The model on the meta device, but for what it computes from its config (rotary frequencies, Gemma's scale)."""
    config = AutoConfig.from_pretrained(side.companions, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        for name, buffer in buffers.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if buffers:
            model._init_weights(module)
    return model


def _fill(prefix: str, arch: Architecture, weights: Weights, name: str, target: Tensor) -> None:
    """One parameter of the module `prefix`, from the file's tensors."""
    full = f"{prefix}.{name}"
    if full in weights.names:
        weights.copy_into(full, target)
        return
    assert arch.experts is not None, f"{full} is in memory, but not in files"
    names = EXPERT_NAMES[arch.family]
    router = _ROUTER.fullmatch(full)
    if router:
        weights.copy_into(f"{router['layer']}.{names.block}.gate.weight", target)
        return
    fused = _FUSED_EXPERTS.fullmatch(full)
    assert fused, f"{full} is in memory, but not in files"
    parts = (names.gate, names.up) if fused["kind"] == "gate_up_proj" else (names.down,)
    for number, expert in enumerate(target):  # [E, 2F, D] or [E, D, F]
        for part, rows in zip(parts, expert.chunk(len(parts)), strict=True):
            weights.copy_into(f"{fused['layer']}.{names.block}.experts.{number}.{part}.weight", rows)
