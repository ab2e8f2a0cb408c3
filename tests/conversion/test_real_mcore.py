"""The same tables on real mcore GPTModels: names, shapes and the claim that padded heads stay zero.

That the loaded models compute what transformers computes is tested in tests/models/test_parity.py.
"""

from pathlib import Path

import pytest
import torch
from conversion_models import FAMILIES, write_tiny_model
from safetensors.torch import load_file
from torch import Tensor

from checkpoints_conversion import check_model
from checkpoints_conversion.live.weights import stream_hf_weights
from oprd_megatron.models import MicroBatch, Model, build_model
from oprd_megatron.parallel import GridLayout
from oprd_megatron.parallel.grid import build_grid, init_mcore_globals
from oprd_megatron.platform import select_platform
from tests.ranks import run_ranks

STAGES = {1: (3,), 2: (1, 2)}


def build(hf_dir: Path, tp_size: int, pp_size: int) -> Model:
    """This rank's trainable part of the model in `hf_dir`; heads are padded to fit."""
    platform = select_platform("cpu")
    layout = GridLayout(tp_size, pp_size, dp=1, sp=False, layers_per_stage=STAGES[pp_size])
    with platform.scope():
        grid = build_grid(layout)
        init_mcore_globals(0, grid.coords.tp)
    return build_model(check_model(hf_dir), grid, platform, dtype=torch.float32, hf_dir=hf_dir, frozen=False)


def stream_on_rank(hf_dirs: list[Path], tp_size: int, pp_size: int) -> None:
    """On one rank: what streams out of each model is the file it was loaded from, bitwise."""
    for hf_dir in hf_dirs:
        model = build(hf_dir, tp_size, pp_size)
        groups = model.grid.groups
        streamed = dict(stream_hf_weights(model.chunks, model.architecture, model.sharding, groups.tp, groups.pp))
        expected = load_file(hf_dir / "model.safetensors")
        assert streamed.keys() == expected.keys()
        assert all(torch.equal(streamed[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 2)])
def test_real_models_stream_what_they_loaded(tp_size: int, pp_size: int, tmp_path: Path) -> None:
    """Every parameter of mcore's own model has its row in the table, on one rank and on TP2 x PP2 with padded heads."""
    hf_dirs = []
    for family in FAMILIES:
        for tied in (True, False):
            hf_dirs.append(tmp_path / f"{family}-{tied}")
            write_tiny_model(family, hf_dirs[-1], tied)
    run_ranks(tp_size * pp_size, stream_on_rank, hf_dirs, tp_size, pp_size)


def padding_gradients_on_rank(hf_dir: Path) -> list[Tensor]:
    """On one rank of TP2 with 3 groups padded to 4: gradients of the last local group, all layers."""
    model = build(hf_dir, 2, 1)
    arch, chunk = model.architecture, model.chunks[0].eval()  # experts train only with sequence parallelism
    ids = torch.arange(7)[None]
    with select_platform("cpu").scope():
        packing = MicroBatch(0, ids[0], [0, 7]).packing(ids.device)
        chunk(ids, ids, None, packed_seq_params=packing).pow(2).sum().backward()
    query_rows = arch.heads_per_group * arch.head_dim
    group_rows = query_rows + 2 * arch.head_dim
    gradients = []
    for layer in chunk.decoder.layers:
        qkv, proj = layer.self_attention.linear_qkv, layer.self_attention.linear_proj
        gradients += [qkv.weight.grad[-group_rows:], proj.weight.grad[:, -query_rows:]]
        if arch.qkv_bias:
            gradients.append(qkv.bias.grad[-group_rows:])
    return gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_heads_get_exactly_zero_gradient(family: str, tmp_path: Path) -> None:
    """The zero group on the last rank has no gradient at all, biases and query/key norms included; real groups have."""
    write_tiny_model(family, tmp_path)
    real, padded = run_ranks(2, padding_gradients_on_rank, tmp_path)
    assert all(gradient.count_nonzero() > 0 for gradient in real)
    assert all(gradient.count_nonzero() == 0 for gradient in padded)
