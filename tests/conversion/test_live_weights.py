"""Loading into and streaming from live sharded models, on gloo grids of 1, 2 and 4 processes, with a fake GPTModel."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conversion_models import FAMILIES, FakeGPT, write_tiny_model
from safetensors.torch import load_file
from torch import Tensor

from checkpoints_conversion import Architecture, Sharding, check_model
from checkpoints_conversion.live.buckets import Manifest, check_stream, in_buckets
from checkpoints_conversion.live.export import export_hf
from checkpoints_conversion.live.weights import (
    canonical_parameters,
    load_hf_tensors,
    load_hf_weights,
    stream_hf_weights,
)
from oprd_megatron.errors import CheckpointError, LayoutError, WeightSyncError
from tests.ranks import run_ranks

LAYERS_OF_STAGE = {1: [[1, 2, 3]], 2: [[1], [2, 3]]}
"""Uneven on purpose: the second stage's local layer 0 is global layer 2."""


def build(arch: Architecture, sharding: Sharding, pp_rank: int, pp_size: int, fused: bool = False) -> FakeGPT:
    """This rank's chunk."""
    numbers = LAYERS_OF_STAGE[pp_size][pp_rank]
    return FakeGPT(arch, sharding, numbers, first=pp_rank == 0, last=pp_rank == pp_size - 1, fused=fused)


def source_tensors(hf_dir: Path) -> dict[str, Tensor]:
    return load_file(hf_dir / "model.safetensors")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Same names, dtypes and values, bit for bit."""
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_load_then_stream_in_one_process(family: str, tied: bool, fused: bool, tmp_path: Path) -> None:
    """Without groups, and with either spec's norm names, what was loaded streams out bitwise, the head once if tied."""
    write_tiny_model(family, tmp_path, tied)
    arch = check_model(tmp_path)
    sharding = Sharding.smallest(arch, vocab_multiple=128)
    model = build(arch, sharding, 0, 1, fused)
    after: list[int] = []
    load_hf_weights([model], tmp_path, sharding, arch, after_each=lambda: after.append(1))
    assert len(after) == len(canonical_parameters([model]))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    streamed = list(stream_hf_weights([model], arch, sharding, None, None))
    assert len(streamed) == len(dict(streamed))
    assert_same(dict(streamed), source_tensors(tmp_path))


def test_virtual_stages_load_their_global_layers(tmp_path: Path) -> None:
    """Two chunks on one rank, layers 1 and 3, are filled by global number, and their names do not collide."""
    write_tiny_model("qwen2", tmp_path)
    arch = check_model(tmp_path)
    sharding = Sharding.smallest(arch)
    chunks = [FakeGPT(arch, sharding, [1], last=False), FakeGPT(arch, sharding, [3], first=False)]
    load_hf_weights(chunks, tmp_path, sharding, arch)
    norm = chunks[1].decoder.layers[0].input_layernorm.weight
    assert torch.equal(norm, source_tensors(tmp_path)["model.layers.2.input_layernorm.weight"])
    assert "decoder.layers.1.input_layernorm.weight" not in canonical_parameters(chunks)


def test_loading_casts_to_the_parameter(tmp_path: Path) -> None:
    """A bfloat16 model loaded from a float32 file holds the rounded values, and stays on its storage."""
    write_tiny_model("llama", tmp_path)
    arch = check_model(tmp_path)
    sharding = Sharding.smallest(arch)
    model = build(arch, sharding, 0, 1).to(torch.bfloat16)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    load_hf_weights([model], tmp_path, sharding, arch)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in source_tensors(tmp_path).items()}
    assert_same(dict(stream_hf_weights([model], arch, sharding, None, None)), expected)


def test_a_sharding_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """3 query groups at TP 2 without padding: refused before any parameter is touched."""
    write_tiny_model("llama", tmp_path)
    arch = check_model(tmp_path)
    with pytest.raises(LayoutError, match="num_query_groups_padded 3"):
        load_hf_weights([], tmp_path, Sharding(0, 2, 3, 512), arch)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes. Rank = pp_rank * tp_size + tp_rank.


@dataclass(frozen=True)
class GridOfRank:
    """This rank's groups and places in them."""

    tp_rank: int
    tp_group: dist.ProcessGroup
    pp_rank: int
    pp_group: dist.ProcessGroup


def make_grid(tp_size: int, pp_size: int) -> GridOfRank:
    """Collective: the groups of a tp x pp grid over the whole world."""
    ranks = torch.arange(tp_size * pp_size).reshape(pp_size, tp_size)
    tp_groups = [dist.new_group(row) for row in ranks.tolist()]
    pp_groups = [dist.new_group(column) for column in ranks.T.tolist()]
    pp_rank, tp_rank = divmod(dist.get_rank(), tp_size)
    return GridOfRank(tp_rank, tp_groups[pp_rank], pp_rank, pp_groups[tp_rank])


def load(hf_dir: Path, grid: GridOfRank, dtype: torch.dtype) -> tuple[Architecture, Sharding, FakeGPT]:
    """This rank's part of the model in `hf_dir`."""
    arch = check_model(hf_dir)
    sharding = Sharding.smallest(arch, grid.tp_rank, grid.tp_group.size(), vocab_multiple=8)
    model = build(arch, sharding, grid.pp_rank, grid.pp_group.size()).to(dtype)
    load_hf_weights([model], hf_dir, sharding, arch)
    return arch, sharding, model


def stream_on_rank(models: list[tuple[Path, torch.dtype]], tp_size: int, pp_size: int) -> list[list[str]]:
    """On one rank: load and stream each model, compare with the file; returns the names in the order they came."""
    grid = make_grid(tp_size, pp_size)
    orders = []
    for hf_dir, dtype in models:
        arch, sharding, model = load(hf_dir, grid, dtype)
        before = [parameter.clone() for parameter in model.parameters()]
        streamed = list(stream_hf_weights([model], arch, sharding, grid.tp_group, grid.pp_group))
        assert_same(dict(streamed), source_tensors(hf_dir))
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        orders.append([name for name, _ in streamed])
    return orders


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_every_rank_streams_the_source(tp_size: int, pp_size: int, tmp_path: Path) -> None:
    """On any grid, for any family and dtype, every rank yields the file it was loaded from, bitwise, in one order.

    3 query groups at TP 2 and 4 are padded to 4 (one rank at TP 4 holds only padding), 509 tokens to a multiple of 8.
    """
    models = []
    for family in FAMILIES:
        for tied, dtype in ((True, torch.float32), (False, torch.bfloat16)):
            hf_dir = tmp_path / f"{family}-{tied}"
            write_tiny_model(family, hf_dir, tied, dtype)
            models.append((hf_dir, dtype))
    orders = run_ranks(tp_size * pp_size, stream_on_rank, models, tp_size, pp_size)
    assert orders == orders[:1] * len(orders)


def move_on_rank(hf_dir: Path, other_dir: Path, max_bytes: int) -> None:
    """On one rank of TP2 x PP2: stream a model in buckets, and take them into a whole model that held other weights."""
    grid = make_grid(2, 2)
    arch, sharding, model = load(hf_dir, grid, torch.float32)
    whole_sharding = Sharding.smallest(arch)
    whole = build(arch, whole_sharding, 0, 1)
    load_hf_weights([whole], other_dir, whole_sharding, arch)
    manifest = Manifest()

    def received() -> Iterator[tuple[str, Tensor]]:
        for bucket in in_buckets(stream_hf_weights([model], arch, sharding, grid.tp_group, grid.pp_group), max_bytes):
            manifest.add(bucket.tensors)
            yield from bucket.tensors

    load_hf_tensors([whole], received(), whole_sharding, arch)
    back = list(stream_hf_weights([whole], arch, whole_sharding, None, None))
    assert_same(dict(back), source_tensors(hf_dir))
    assert [name for name, _ in check_stream(back, manifest.records)] == [name for name, _ in back]


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma3_text", "qwen3_moe"])
def test_in_buckets_from_one_layout_into_another(family: str, tmp_path: Path) -> None:
    """A live model at TP2 x PP2 becomes a live model in one process, through bounded buckets, bit for bit; the manifest
    made on the way describes it."""
    write_tiny_model(family, tmp_path / "a", tied=family == "llama")
    write_tiny_model(family, tmp_path / "b", tied=family == "llama", seed=9)
    run_ranks(4, move_on_rank, tmp_path / "a", tmp_path / "b", 30_000)


def test_a_stream_of_another_model_is_refused(tmp_path: Path) -> None:
    """Missing, out of order, of another shape, too many: the tensor is named."""
    write_tiny_model("llama", tmp_path)
    arch = check_model(tmp_path)
    sharding = Sharding.smallest(arch)
    model = build(arch, sharding, 0, 1)
    load_hf_weights([model], tmp_path, sharding, arch)
    tensors = list(stream_hf_weights([model], arch, sharding, None, None))
    for stream, said in (
        (tensors[:-1], "lm_head.weight was to come, and the end came"),
        ([tensors[1], tensors[0]], "model.embed_tokens.weight was to come"),
        ([(tensors[0][0], tensors[0][1][1:])], "is \\[508, 48\\], not \\[509, 48\\]"),
        ([*tensors, ("more", tensors[0][1])], "more came after the last tensor"),
    ):
        with pytest.raises(WeightSyncError, match=said):
            load_hf_tensors([model], stream, sharding, arch)


def export_on_rank(source: Path, out: Path) -> bool:
    """On one rank of TP2 x PP2: export, then try to export over it; returns whether the second was refused here."""
    grid = make_grid(2, 2)
    arch, sharding, model = load(source, grid, torch.float32)
    where = ([model], arch, sharding, grid.tp_group, grid.pp_group, source, out)
    export_hf(*where, is_writer=dist.get_rank() == 0, max_shard_bytes=100_000)
    dist.barrier()
    try:
        export_hf(*where, is_writer=dist.get_rank() == 0)
    except CheckpointError:
        return True
    return False


def test_collective_export_is_the_source_and_a_failing_writer_hangs_nobody(tmp_path: Path) -> None:
    """TP2 x PP2 exports the source's tensors from rank 0; a refused second export raises there and only there."""
    source, out = tmp_path / "source", tmp_path / "out"
    write_tiny_model("qwen2", source, tied=True)
    assert run_ranks(4, export_on_rank, source, out) == [True, False, False, False]
    assert check_model(out) == check_model(source)
    written: dict[str, Tensor] = {}
    for file in out.glob("model-*.safetensors"):
        written.update(load_file(file))
    assert_same(written, source_tensors(source))
