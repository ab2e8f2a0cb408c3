"""mcore models against transformers in fp32: logits and every hidden state, in every layout, of a ragged pack."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints_conversion import read_architecture
from oprd_megatron.config.precision import PrecisionConfig
from oprd_megatron.config.schema import ParallelConfig
from oprd_megatron.models import Model, build_model, no_output_loss, run_schedule
from oprd_megatron.parallel import resolve_layout, tp_divisible
from oprd_megatron.parallel.grid import build_grid, init_mcore_globals
from oprd_megatron.platform import select_platform
from oprd_megatron.representation.batch import Sample
from oprd_megatron.representation.feed import micro_batches
from oprd_megatron.representation.placement import arrange, place_tokens
from oprd_megatron.representation.taps import attached_taps
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

VOCAB = 509
LAYOUTS = {
    "single": ParallelConfig(),
    "tp2": ParallelConfig(tp=2),
    "tp2sp": ParallelConfig(tp=2, sp=True),
    "pp2": ParallelConfig(pp=2),
    "pp2_uneven": ParallelConfig(pp=2, layers_per_stage=[1, 3]),
    "tp2pp2sp": ParallelConfig(tp=2, pp=2, sp=True),
    "cp2": ParallelConfig(cp=2),
    "cp2_tp2sp": ParallelConfig(cp=2, tp=2, sp=True),
    "pp2vpp2": ParallelConfig(pp=2, vpp=2),
}
TOLERANCE = 1e-5
"""Largest difference allowed in fp32: sums are taken in another order, nothing else differs."""


def build(
    hf_dir: Path, parallel: ParallelConfig, pad_heads: bool = False, precision: PrecisionConfig | None = None
) -> Model:
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
    return build_model(
        architecture, grid, platform, dtype=torch.float32, hf_dir=hf_dir, frozen=True, precision=precision
    )


def states_and_logits(
    hf_dir: Path,
    parallel: ParallelConfig,
    texts: list[tuple[int, ...]],
    pad_heads: bool,
    precision: PrecisionConfig | None = None,
) -> dict:
    """This rank's tapped states {layer: (token numbers, rows)} and logits (token numbers, rows [N, V_local]) of the texts,
    run as one pack."""
    model = build(hf_dir, parallel, pad_heads, precision)
    coords, layout = model.grid.coords, model.grid.layout
    samples = [Sample(ids, ()) for ids in texts]
    arrangement = arrange([len(ids) for ids in texts], layout, len(texts))
    positions = [range(len(ids)) for ids in texts]
    tokens = place_tokens(positions, arrangement, layout)
    of_share = place_tokens(positions, arrangement, replace(layout, tp=1, sp=False))  # rows before sequence parallelism
    on_share = np.flatnonzero(tokens.cp == coords.cp)
    here = on_share[tokens.shard[on_share] == coords.tp] if layout.sp else on_share
    states, logits = {}, []

    def tap(layer: int, micro_batch: int, hidden: torch.Tensor) -> None:
        if micro_batch == 0:  # the others are fillers of an interleaved schedule
            states[layer] = (here, hidden.flatten(0, 1)[tokens.local_row[here]])

    def keep(micro_batch: int, output: torch.Tensor) -> torch.Tensor:
        if micro_batch == 0:
            logits.append((on_share, output[0][of_share.local_row[on_share]]))
        return no_output_loss(micro_batch, output)

    layers = range(1, model.architecture.num_layers + 1)
    fed = micro_batches([sample.ids for sample in samples], arrangement, model.grid)
    with attached_taps(model, layers, "post_norm", tap):
        run_schedule(model, select_platform("cpu"), fed, forward_only=True, head=True, on_output=keep)
    return {
        "coords": coords,
        "states": states,
        "logits": logits[:1],
    }  # later ones are fillers of an interleaved schedule


def reference(hf_dir: Path, texts: list[tuple[int, ...]]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Every layer's states [M, D] and the logits [M, V], one text at a time."""
    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)
    with torch.no_grad():
        outputs = [model(torch.tensor([ids]), output_hidden_states=True) for ids in texts]
    states = [
        torch.cat(layer, dim=1)[0] for layer in zip(*(output.hidden_states[1:] for output in outputs), strict=True)
    ]
    return states, torch.cat([output.logits for output in outputs], dim=1)[0]


def assert_parity(
    hf_dir: Path,
    parallel: ParallelConfig,
    texts: list[tuple[int, ...]],
    pad_heads: bool,
    vocab: int,
    tolerance: float,
    precision: PrecisionConfig | None = None,
    expected_dir: Path | None = None,
) -> None:
    """`expected_dir`: transformers' weights, where they are not those of `hf_dir`."""
    world = parallel.tp * parallel.cp * parallel.pp
    ranks = run_ranks(world, states_and_logits, hf_dir, parallel, texts, pad_heads, precision)
    states, logits = reference(expected_dir or hf_dir, texts)
    for layer, expected in enumerate(states, start=1):
        found = torch.full_like(expected, torch.nan)
        holders = [rank["states"][layer] for rank in ranks if layer in rank["states"]]
        assert len(holders) == parallel.tp * parallel.cp, f"layer {layer} is tapped on {len(holders)} ranks"
        for tokens, rows in holders:
            found[tokens] = rows
        scale = expected.abs().max().item() if tolerance > TOLERANCE else 1.0
        assert (found - expected).abs().max().item() <= tolerance * scale, f"layer {layer}"
    found = torch.full_like(logits, torch.nan)
    for cp in range(parallel.cp):
        shards = [rank["logits"][0] for rank in ranks if rank["logits"] and rank["coords"].cp == cp]
        found[shards[0][0]] = torch.cat([rows for _, rows in shards], dim=-1)[:, :vocab]
    scale = logits.abs().max().item() if tolerance > TOLERANCE else 1.0
    assert (found - logits).abs().max().item() <= tolerance * scale


def ragged_texts(lengths: list[int], vocab: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(0, vocab, (length,), generator=generator).tolist()) for length in lengths]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False), ("qwen3", True)])
def test_tiny_models_equal_transformers(tmp_path: Path, layout: str, family: str, tied: bool) -> None:
    """Logits and the hidden state of every layer (the last after the final norm) equal transformers' in every layout."""
    tiny_hf_model(family, tmp_path, tied=tied, num_layers=4, vocab_size=VOCAB, std=0.1)
    assert_parity(
        tmp_path, LAYOUTS[layout], ragged_texts([10, 3, 7, 1], VOCAB), pad_heads=False, vocab=VOCAB, tolerance=TOLERANCE
    )


@pytest.mark.parametrize("layout", ["tp2", "tp2sp"])
def test_padded_heads_equal_transformers(tmp_path: Path, layout: str) -> None:
    """Three key/value heads split over two ranks: the zero heads change nothing."""
    tiny_hf_model("llama", tmp_path, heads=9, kv_heads=3, hidden_size=72, num_layers=2, vocab_size=VOCAB, std=0.1)
    assert_parity(
        tmp_path, LAYOUTS[layout], ragged_texts([8, 5], VOCAB), pad_heads=True, vocab=VOCAB, tolerance=TOLERANCE
    )
