"""A frozen teacher whose linear layers Transformer Engine computes in fp8. Not yet run on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_conversion import read_architecture
from oprd_megatron.config.precision import PrecisionConfig
from oprd_megatron.models import MicroBatch, Model, build_model, run_schedule
from oprd_megatron.parallel import GridLayout
from oprd_megatron.parallel.grid import build_grid, init_mcore_globals
from oprd_megatron.parallel.memory import ModelMemory
from oprd_megatron.platform import select_platform
from oprd_megatron.representation.taps import attached_taps
from tests.gpu import needs
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

LAYERS, TOKENS = 6, 64
SHAPE: dict[str, Any] = dict(num_layers=LAYERS, hidden_size=1024, heads=8, kv_heads=2, ffn=4096, std=0.03)
FP8 = PrecisionConfig(linear="fp8")
LEAST_COSINE = 0.99
"""Of a state in fp8 and in bf16: rounding to three bits, over six layers."""
BESIDE_WEIGHTS = 32 << 20
"""Bytes that building may leave besides the weights: rotary tables, TE's workspace."""


def teacher(hf_dir: Path, precision: PrecisionConfig) -> Model:
    """Frozen, without a head, on this rank's GPU."""
    platform, architecture = select_platform("cuda"), read_architecture(hf_dir)
    layout = GridLayout(1, 1, 1, False, (LAYERS,), token_multiple=precision.token_multiple)
    with platform.scope():
        grid = build_grid(layout)
        init_mcore_globals(0, 0)
    return build_model(
        architecture, grid, platform, dtype=torch.bfloat16, hf_dir=hf_dir, frozen=True, precision=precision, head=False
    )


def states(model: Model) -> list[torch.Tensor]:
    """Every layer's [TOKENS, D] on some text, on the host."""
    found: dict[int, torch.Tensor] = {}

    def keep(layer: int, micro_batch: int, hidden: torch.Tensor) -> None:
        found[layer] = hidden.flatten(0, 1).float().cpu()

    ids = torch.arange(TOKENS) % 250
    with attached_taps(model, range(1, LAYERS + 1), "post_norm", keep):
        run_schedule(model, select_platform("cuda"), [MicroBatch(0, ids, [0, TOKENS])], forward_only=True)
    return [found[layer] for layer in sorted(found)]


def held(hf_dir: Path) -> dict[str, Any]:
    """What a teacher in fp8 leaves on the GPU, and what its weights are."""
    from megatron.core.fp8_utils import is_float8tensor

    torch.cuda.init()
    before = torch.cuda.memory_allocated()
    model = teacher(hf_dir, FP8)
    built = torch.cuda.memory_allocated() - before
    parameters = dict(model.chunks[0].decoder.named_parameters())
    linear = {name: p for name, p in parameters.items() if name.split(".")[-2].startswith("linear_") and p.dim() == 2}
    states(model)
    return {
        "bytes": built,
        "in fp8": [is_float8tensor(parameter) for parameter in linear.values()],
        "transposed": [parameter._transpose is not None for parameter in linear.values()],
        "in bf16": [hasattr(parameter, "get_high_precision_init_val") for parameter in linear.values()],
        "layout": model.grid.layout,
    }


@needs(capability=(9, 0), transformer_engine=True)
def test_weights_are_held_once(tmp_path: Path) -> None:
    """A byte a number of the linear layers, as the plan says: no transposed copy, not after a forward either, none in bf16."""
    tiny_hf_model("llama", tmp_path, tied=False, **SHAPE)
    (found,) = run_ranks(1, held, tmp_path)
    assert len(found["in fp8"]) == 4 * LAYERS and all(found["in fp8"])
    assert not any(found["transposed"]) and not any(found["in bf16"])
    memory = ModelMemory(read_architecture(tmp_path), found["layout"], "bf16", 0, False, precision=FP8, has_head=False)
    assert 0 <= found["bytes"] - memory.stages(1, 1)[0].weights < BESIDE_WEIGHTS


def both(hf_dir: Path, precision: PrecisionConfig) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return states(teacher(hf_dir, PrecisionConfig())), states(teacher(hf_dir, precision))


@needs(capability=(9, 0), transformer_engine=True)
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_states_are_near(tmp_path: Path, recipe: Any) -> None:
    """The slices that were loaded are the weights (a TE tensor filled slice by slice would hold noise), and every state
    is near its bf16 one, but not it."""
    tiny_hf_model("llama", tmp_path, tied=False, **SHAPE)
    ((exact, moved),) = run_ranks(1, both, tmp_path, PrecisionConfig(linear="fp8", recipe=recipe))
    for a, b in zip(exact, moved, strict=True):
        assert torch.cosine_similarity(a, b, dim=-1).min() > LEAST_COSINE
        assert not torch.equal(a, b)


@needs(capability=(9, 0), transformer_engine=True)
def test_layers_that_stay(tmp_path: Path) -> None:
    """A first layer that mcore keeps, and a second that this project keeps, are in bf16: their states are the same bit for bit,
    the third is not."""
    tiny_hf_model("llama", tmp_path, tied=False, **SHAPE)
    ((exact, moved),) = run_ranks(1, both, tmp_path, PrecisionConfig(linear="fp8", first_layers=1, keep_layers=[2]))
    assert torch.equal(exact[0], moved[0]) and torch.equal(exact[1], moved[1]) and not torch.equal(exact[2], moved[2])


@needs()
def test_weight_only_on_a_gpu(tmp_path: Path) -> None:
    """Weights alone in fp8 need no Transformer Engine: states are near those in bf16."""
    tiny_hf_model("llama", tmp_path, tied=False, **SHAPE)
    ((exact, moved),) = run_ranks(1, both, tmp_path, PrecisionConfig(linear="weight_only"))
    assert all(torch.cosine_similarity(a, b, dim=-1).min() > LEAST_COSINE for a, b in zip(exact, moved, strict=True))
