"""Tiny random models in transformers and in mcore: hidden states of every layer, logits and gradients of both.

The loss is a fixed random weight on every logit, `sum(weights * logits) / M`. It reaches every parameter, needs no collective
over a split vocabulary, and is the same in transformers.

Legend: M tokens of all texts, D width, V vocabulary, V_local rows of the head on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from checkpoints_conversion import read_architecture
from oprd_megatron.config.schema import OptimizerConfig, ParallelConfig
from oprd_megatron.models import Model, build_model, run_schedule
from oprd_megatron.optimizer import build_optimizer, stream_gradients
from oprd_megatron.parallel import resolve_layout, tp_divisible
from oprd_megatron.parallel.grid import build_grid, init_mcore_globals
from oprd_megatron.platform import Platform
from oprd_megatron.representation.feed import micro_batches
from oprd_megatron.representation.placement import arrange, place_tokens
from oprd_megatron.representation.taps import attached_taps
from tests.tiny_models import SPECIAL_TOKENS, Family, tiny_hf_model

FAMILIES: tuple[tuple[Family, bool], ...] = (("llama", True), ("qwen2", False), ("qwen3", True))
"""(family, whether head and embedding are tied)."""
VOCAB = 509
LENGTHS = (40, 3, 97, 1)
"""Tokens of the texts, which are packed: ragged, one of a single token."""


@dataclass(frozen=True)
class Figures:
    """What one model computes, or one rank's part of it, on the CPU in fp32.

    Attributes:
        states: {layer: [M, D]} of the layers that are here, the last after the final norm.
        logits: [M, V_local], None where the head is elsewhere.
        gradients: {Hugging Face name: whole gradient}.
    """

    states: dict[int, torch.Tensor]
    logits: torch.Tensor | None
    gradients: dict[str, torch.Tensor]


def write_tiny(folder: Path, family: Family, tied: bool) -> None:
    """Four layers of width 256 with heads of 64, which every attention kernel takes. States stay near 1 in size."""
    shape = dict(hidden_size=256, heads=4, kv_heads=2, ffn=512, num_layers=4, vocab_size=VOCAB)
    tiny_hf_model(family, folder, tied=tied, std=0.04, **shape)  # type: ignore[arg-type]


def texts() -> list[tuple[int, ...]]:
    """Token ids, the same everywhere. transformers gives the padding token's embedding no gradient, so it is not among them."""
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randint(len(SPECIAL_TOKENS), VOCAB, (length,), generator=generator).tolist()) for length in LENGTHS
    ]


def logit_weights() -> torch.Tensor:
    """[M, V], the same everywhere."""
    return torch.randn(sum(LENGTHS), VOCAB, generator=torch.Generator().manual_seed(2))


def reference(folder: Path, device: str) -> Figures:
    """transformers in fp32, one text at a time."""
    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(folder, dtype=torch.float32).to(device)
    outputs = [model(torch.tensor([ids], device=device), output_hidden_states=True) for ids in texts()]
    logits = torch.cat([output.logits for output in outputs], dim=1)[0]
    (logits * logit_weights().to(device)).sum().div(sum(LENGTHS)).backward()
    layers = zip(*(output.hidden_states[1:] for output in outputs), strict=True)
    states = {number: torch.cat(of, dim=1)[0].detach().cpu() for number, of in enumerate(layers, start=1)}
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return Figures(states, logits.detach().cpu(), gradients)


def build(folder: Path, platform: Platform, parallel: ParallelConfig, dtype: torch.dtype, engine: bool) -> Model:
    """A trainable mcore model on the ranks of this world. Collective.

    Args:
        engine: mcore's Transformer Engine layers, if they are installed; else this project's own, also where they are.
    """
    architecture = read_architecture(folder)
    layout = resolve_layout(
        parallel, name="parallel", world_size=dist.get_world_size(), num_layers=architecture.num_layers,
        divisible=tp_divisible(architecture, False),
    )  # fmt: skip
    with platform.scope():
        grid = build_grid(layout)
        init_mcore_globals(0, grid.coords.tp)
    with patch("oprd_megatron.models.build.has_transformer_engine", return_value=engine):
        return build_model(architecture, grid, platform, dtype=dtype, hf_dir=folder, frozen=False)


def ours(
    folder: Path, platform: Platform, parallel: ParallelConfig, dtype: torch.dtype, engine: bool = False
) -> Figures:
    """This rank's part of a forward and backward pass over one pack of all texts. Collective."""
    model = build(folder, platform, parallel, dtype, engine)
    optimizer = build_optimizer(model, OptimizerConfig(), 2, platform, trains_head=True)
    optimizer.zero_grad()
    ids, layout, coords = texts(), model.grid.layout, model.grid.coords
    arrangement = arrange([len(text) for text in ids], layout, len(ids))
    rows = torch.as_tensor(
        place_tokens([range(len(text)) for text in ids], arrangement, layout).local_row, device=platform.device
    )
    weights = torch.zeros(sum(LENGTHS), model.sharding.vocab_size_padded)
    weights[:, :VOCAB] = logit_weights()
    shard = weights.chunk(layout.tp, dim=1)[coords.tp].to(platform.device)
    states: dict[int, torch.Tensor] = {}
    logits: list[torch.Tensor] = []

    def tap(layer: int, micro_batch: int, hidden: torch.Tensor) -> None:
        states[layer] = _on_cpu(hidden.flatten(0, 1)[rows])

    def loss(micro_batch: int, output: torch.Tensor) -> torch.Tensor:
        logits.append(_on_cpu(output[0][rows]))
        return (output[0][rows].float() * shard).sum() / sum(LENGTHS)

    fed: Any = micro_batches(ids, arrangement, model.grid)
    with attached_taps(model, range(1, model.architecture.num_layers + 1), "post_norm", tap):
        run_schedule(model, platform, fed, forward_only=False, chunks=optimizer.chunks, head=True, on_output=loss)
    gradients = {name: _on_cpu(gradient) for name, gradient in stream_gradients(model)}
    return Figures(states, logits[0] if logits else None, gradients)


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().cpu()


def whole(parts: list[Figures]) -> Figures:
    """One model from its ranks' parts, in rank order: layers of all stages, logits of all vocabulary shards."""
    states = {layer: state for part in parts for layer, state in part.states.items()}
    shards = [part.logits for part in parts if part.logits is not None]
    return Figures(states, torch.cat(shards, dim=-1)[:, :VOCAB], parts[0].gradients)


def off(found: Figures, expected: Figures) -> dict[str, float]:
    """Relative errors |found - expected| / |expected| by norms: of the worst layer, of the logits, and of the worst gradient
    (one that is below a hundredth of all of them counts as that hundredth)."""
    assert found.states.keys() == expected.states.keys() and found.gradients.keys() >= expected.gradients.keys()
    assert found.logits is not None and expected.logits is not None
    total = torch.stack([gradient.norm() for gradient in expected.gradients.values()]).norm()
    gradients = [
        float((found.gradients[name] - gradient).norm() / gradient.norm().clamp_min(0.01 * total))
        for name, gradient in expected.gradients.items()
    ]
    states = [relative(found.states[layer], state) for layer, state in expected.states.items()]
    return {"states": worst(states), "logits": relative(found.logits, expected.logits), "gradients": worst(gradients)}


def worst(errors: list[float]) -> float:
    """The largest; NaN if one is, which the builtin would hide."""
    return float(torch.tensor(errors).max())


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|, any shape."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def least_cosine(found: Figures, expected: Figures) -> float:
    """Of the states of one token in one layer, meant over tokens: the layer where it is least."""
    means = [
        torch.nn.functional.cosine_similarity(found.states[layer], state, dim=-1).mean()
        for layer, state in expected.states.items()
    ]
    return float(torch.stack(means).min())
