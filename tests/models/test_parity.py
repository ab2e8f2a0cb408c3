"""mcore models against transformers in fp32: logits and every hidden state, in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints_conversion import read_architecture
from oprd_megatron.config.schema import ParallelConfig
from oprd_megatron.models import Model, build_model, no_output_loss, run_schedule, tp_divisible
from oprd_megatron.parallel import build_grid, resolve_layout
from oprd_megatron.parallel.grid import init_mcore_globals
from oprd_megatron.platform import select_platform
from oprd_megatron.representation.taps import attach_taps
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

VOCAB = 509
LAYOUTS = {
    "single": ParallelConfig(),
    "tp2": ParallelConfig(tp=2),
    "tp2sp": ParallelConfig(tp=2, sp=True),
    "pp2": ParallelConfig(pp=2),
    "pp2_uneven": ParallelConfig(pp=2, layers_per_stage=[1, 2]),
    "tp2pp2sp": ParallelConfig(tp=2, pp=2, sp=True),
}
TOLERANCE = 1e-5
"""Largest difference allowed in fp32: sums are taken in another order, nothing else differs."""


def build(hf_dir: Path, parallel: ParallelConfig, pad_heads: bool = False) -> Model:
    import torch.distributed as dist

    platform = select_platform("cpu")
    architecture = read_architecture(hf_dir)
    layout = resolve_layout(
        parallel, name="student.parallel", world_size=dist.get_world_size(), num_layers=architecture.num_layers,
        divisible=tp_divisible(architecture, pad_heads),
    )  # fmt: skip
    with platform.scope():
        grid = build_grid(layout)
        init_mcore_globals(0, grid.coords.tp)
    return build_model(architecture, grid, platform, dtype=torch.float32, hf_dir=hf_dir, frozen=True)


def states_and_logits(hf_dir: Path, parallel: ParallelConfig, ids: torch.Tensor, pad_heads: bool) -> dict:
    """This rank's tapped states {layer: [S_local, B, D]} and logits [B, S, V_local], with its coordinates."""
    model = build(hf_dir, parallel, pad_heads)
    states, logits = {}, []
    layers = range(1, model.architecture.num_layers + 1)
    attach_taps(model, layers, "post_norm", lambda layer, _, hidden: states.update({layer: hidden.clone()}))

    def keep(micro_batch: int, output: torch.Tensor) -> torch.Tensor:
        logits.append(output.clone())
        return no_output_loss(micro_batch, output)

    run_schedule(model, select_platform("cpu"), [ids], forward_only=True, head=True, on_output=keep)
    return {"coords": model.grid.coords, "states": states, "logits": logits}


def reference(hf_dir: Path, ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
    return list(output.hidden_states[1:]), output.logits


def assert_parity(
    hf_dir: Path, parallel: ParallelConfig, ids: torch.Tensor, pad_heads: bool, vocab: int, tolerance: float
):
    ranks = run_ranks(parallel.tp * parallel.pp, states_and_logits, hf_dir, parallel, ids, pad_heads)
    states, logits = reference(hf_dir, ids)
    for layer, expected in enumerate(states, start=1):
        shards = [rank["states"][layer] for rank in ranks if layer in rank["states"]]
        assert len(shards) == parallel.tp, f"layer {layer} is tapped on {len(shards)} ranks"
        found = torch.cat(shards) if parallel.sp else shards[-1]
        scale = expected.abs().max().item() if tolerance > TOLERANCE else 1.0
        assert (found.transpose(0, 1) - expected).abs().max().item() <= tolerance * scale, f"layer {layer}"
    shards = [rank["logits"][0] for rank in ranks if rank["logits"]]
    found = torch.cat(shards, dim=-1)[..., :vocab]
    scale = logits.abs().max().item() if tolerance > TOLERANCE else 1.0
    assert (found - logits).abs().max().item() <= tolerance * scale


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False), ("qwen3", True)])
def test_tiny_models_equal_transformers(tmp_path: Path, layout: str, family: str, tied: bool) -> None:
    """Logits and the hidden state of every layer (the last after the final norm) equal transformers' in every layout."""
    tiny_hf_model(family, tmp_path, tied=tied, num_layers=3, vocab_size=VOCAB, std=0.1)
    ids = torch.randint(0, VOCAB, (3, 10), generator=torch.Generator().manual_seed(1))
    assert_parity(tmp_path, LAYOUTS[layout], ids, pad_heads=False, vocab=VOCAB, tolerance=TOLERANCE)


@pytest.mark.parametrize("layout", ["tp2", "tp2sp"])
def test_padded_heads_equal_transformers(tmp_path: Path, layout: str) -> None:
    """Three key/value heads split over two ranks: the zero heads change nothing."""
    tiny_hf_model("llama", tmp_path, heads=9, kv_heads=3, hidden_size=72, num_layers=2, vocab_size=VOCAB, std=0.1)
    ids = torch.randint(0, VOCAB, (2, 8), generator=torch.Generator().manual_seed(1))
    assert_parity(tmp_path, LAYOUTS[layout], ids, pad_heads=True, vocab=VOCAB, tolerance=TOLERANCE)
