"""A Megatron checkpoint computed by the GPTModel that training builds, a layer's weights at a time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from checkpoints_conversion.architecture import Architecture, Sharding
from checkpoints_conversion.families import mappings_for
from checkpoints_conversion.live.weights import canonical_parameters
from checkpoints_conversion.mappings import Mapping
from checkpoints_conversion.verify.sides import Side
from checkpoints_conversion.verify.streaming import (
    OnState,
    StreamedHead,
    Weights,
    capture,
    lend_rows,
    lend_weights,
)
from oprd_megatron.config.schema import RecomputeConfig
from oprd_megatron.models.build import make_chunk, transformer_config
from oprd_megatron.models.micro_batch import MicroBatch
from oprd_megatron.parallel import GridLayout
from oprd_megatron.parallel.grid import build_grid, init_mcore_globals
from oprd_megatron.platform import Platform, init_distributed


@torch.no_grad()
def run_megatron(
    side: Side,
    weights: Weights,
    batches: Sequence[Tensor],
    positions: Sequence[Tensor],
    dtype: torch.dtype,
    on_state: OnState,
) -> None:
    """As `run_transformers`. A batch is one pack of its sequences."""
    platform = Platform(torch.device("cpu"), "gloo")
    with _world_of_one(platform), platform.scope():
        model = _build(side.arch, platform, dtype)
        head = _stream(model, side.arch, weights, dtype, on_state)
        for ids, chosen in zip(batches, positions, strict=True):
            head.positions = chosen
            count, length = ids.shape
            pack = MicroBatch(0, ids.flatten(), range(0, count * length + 1, length))
            tokens = pack.ids.unsqueeze(0)
            model(tokens, tokens, None, packed_seq_params=pack.packing(platform.device))


@contextlib.contextmanager
def _world_of_one(platform: Platform) -> Iterator[None]:
    """mcore's groups need a world; one that was there before is left as it is."""
    is_ours = not dist.is_initialized()
    init_distributed(platform)
    try:
        yield
    finally:
        if is_ours:
            dist.destroy_process_group()


def _build(arch: Architecture, platform: Platform, dtype: torch.dtype) -> GPTModel:
    """The whole model on the meta device, without padding."""
    grid = build_grid(GridLayout(1, 1, 1, False, (arch.num_layers,)))
    init_mcore_globals(0, 0)
    sharding = Sharding.smallest(arch)
    config = transformer_config(arch, grid.layout, 0, sharding, dtype, platform, RecomputeConfig())
    model = make_chunk(arch, grid, config, sharding, 0, torch.device("meta")).eval()
    on_cpu = [name for name, parameter in model.named_parameters() if not parameter.is_meta]
    assert not on_cpu, f"{on_cpu} have memory before they have weights"
    return model


def _stream(
    model: GPTModel, arch: Architecture, weights: Weights, dtype: torch.dtype, on_state: OnState
) -> StreamedHead:
    """Let every module of the model have its weights while it runs; returns what stands in for its head."""
    table = mappings_for(arch)
    names = {id(parameter): name for name, parameter in canonical_parameters([model]).items()}
    lend_rows(model.embedding.word_embeddings, _hf_name(table["embedding.word_embeddings.weight"]), weights, dtype)
    capture(model.embedding, 0, on_state)
    units = [*model.decoder.layers, model.decoder.final_layernorm]
    for unit, module in enumerate(units, 1):
        rows = {name: table[names[id(parameter)]] for name, parameter in module.named_parameters()}
        lend_weights(module, _fill_from(rows, weights, Sharding.smallest(arch)), dtype)
        capture(module, unit, on_state)
    on_logits = functools.partial(on_state, arch.num_layers + 2)
    name = _hf_name(table["output_layer.weight"])
    head = StreamedHead(model.output_layer, name, arch.vocab_size, weights, dtype, on_logits)
    model.output_layer = head
    return head


def _hf_name(mapping: Mapping) -> str:
    return mapping.hf_names[0]


def _fill_from(rows: dict[str, Mapping], weights: Weights, sharding: Sharding) -> Callable[[str, Tensor], None]:
    """Fills a module's parameters by their rows of the family's table."""

    def fill(name: str, target: Tensor) -> None:
        rows[name].load(target, weights.read, sharding)

    return fill
