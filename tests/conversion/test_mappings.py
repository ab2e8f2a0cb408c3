"""The mappings: hand-written layouts first, then round trips over arbitrary sizes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checkpoints_conversion import Architecture, Sharding
from checkpoints_conversion.mappings import (
    QKV,
    AttentionOutput,
    Columns,
    FusedGatedMLP,
    FusedQKV,
    GatedMLP,
    Mapping,
    ReadRows,
    Replicated,
    RowParallel,
    VocabParallel,
)
from oprd_megatron.errors import LayoutError


def reader_of(tensors: dict[str, Tensor]) -> ReadRows:
    """`read` over tensors in memory; refuses ranges outside the tensor."""

    def read(name: str, row: int, rows: int, columns: Columns) -> Tensor:
        assert row >= 0 and rows > 0 and row + rows <= tensors[name].shape[0]
        found = tensors[name][row : row + rows]
        if columns is None:
            return found
        assert 0 <= columns[0] < columns[1] <= found.shape[1]
        return found[:, columns[0] : columns[1]]

    return read


def random_hf_tensors(mapping: Mapping) -> dict[str, Tensor]:
    """Distinct values, so that any swap shows."""
    tensors, offset = {}, 1
    for name, shape in mapping.hf_shapes.items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(offset, offset + count, dtype=torch.float64).reshape(shape)
        offset += count
    return tensors


def all_shards(mapping: Mapping, tensors: dict[str, Tensor], sharding: Sharding) -> list[Tensor]:
    """What every tensor-parallel rank loads."""
    ranks = [replace(sharding, tp_rank=rank) for rank in range(sharding.tp_size)]
    dtype = next(iter(tensors.values())).dtype
    shards = []
    for rank in ranks:
        shards.append(torch.full(mapping.megatron_shape(rank), -1, dtype=dtype))
        mapping.load(shards[-1], reader_of(tensors), rank)
    return shards


def labels(tensor: Tensor) -> list[int]:
    return [int(value) for value in tensor.flatten()]


def test_qkv_layout_by_hand() -> None:
    """4 heads in 2 groups, head_dim 1: mcore's rows are q0 q1 k0 v0 | q2 q3 k1 v1, one group a rank at TP 2."""
    mapping = QKV("qkv", ("q", "k", "v"), num_query_groups=2, heads_per_group=2, head_dim=1, columns=1)
    tensors = {
        "q": torch.tensor([[10], [11], [12], [13]]),
        "k": torch.tensor([[20], [21]]),
        "v": torch.tensor([[30], [31]]),
    }
    whole = all_shards(mapping, tensors, Sharding(0, 1, 2, 1))
    assert [labels(shard) for shard in whole] == [[10, 11, 20, 30, 12, 13, 21, 31]]
    halves = all_shards(mapping, tensors, Sharding(0, 2, 2, 1))
    assert [labels(shard) for shard in halves] == [[10, 11, 20, 30], [12, 13, 21, 31]]


def test_qkv_padding_by_hand() -> None:
    """One real group over TP 2 with head_dim 2: the second rank holds only zeros; the bias pads the same way."""
    mapping = QKV("qkv", ("q", "k", "v"), num_query_groups=1, heads_per_group=1, head_dim=2, columns=None)
    tensors = {"q": torch.tensor([1, 2]), "k": torch.tensor([3, 4]), "v": torch.tensor([5, 6])}
    shards = all_shards(mapping, tensors, Sharding(0, 2, 2, 1))
    assert [labels(shard) for shard in shards] == [[1, 2, 3, 4, 5, 6], [0] * 6]


def test_fused_sources_by_hand() -> None:
    """Phi-3's qkv_proj is all queries, all keys, all values; its gate_up_proj all gates, then all ups."""
    qkv = FusedQKV("qkv", ("qkv",), num_query_groups=2, heads_per_group=2, head_dim=1, columns=1)
    tensors = {"qkv": torch.tensor([[10], [11], [12], [13], [20], [21], [30], [31]])}
    shards = all_shards(qkv, tensors, Sharding(0, 2, 2, 1))
    assert [labels(shard) for shard in shards] == [[10, 11, 20, 30], [12, 13, 21, 31]]
    mlp = FusedGatedMLP("fc1", ("gate_up",), (4, 1))
    tensors = {"gate_up": torch.tensor([[1], [2], [3], [4], [5], [6], [7], [8]])}
    shards = all_shards(mlp, tensors, Sharding(0, 2, 1, 1))
    assert [labels(shard) for shard in shards] == [[1, 2, 5, 6], [3, 4, 7, 8]]


def test_attention_output_padding_by_hand() -> None:
    """3 groups padded to 4 over TP 2: columns follow the groups of linear_qkv, the last rank ends in a zero group."""
    mapping = AttentionOutput("proj", ("o",), (1, 6), group_width=2)
    shards = all_shards(mapping, {"o": torch.tensor([[1, 2, 3, 4, 5, 6]])}, Sharding(0, 2, 4, 1))
    assert [labels(shard) for shard in shards] == [[1, 2, 3, 4], [5, 6, 0, 0]]


def test_gated_mlp_by_hand() -> None:
    """Each rank has its gate rows, then its up rows: mcore chunks the local output in two."""
    mapping = GatedMLP("fc1", ("gate", "up"), (4, 1))
    tensors = {"gate": torch.tensor([[1], [2], [3], [4]]), "up": torch.tensor([[5], [6], [7], [8]])}
    shards = all_shards(mapping, tensors, Sharding(0, 2, 1, 1))
    assert [labels(shard) for shard in shards] == [[1, 2, 5, 6], [3, 4, 7, 8]]


def test_vocabulary_padding_by_hand() -> None:
    """5 tokens padded to 8 over TP 4: one rank half padded, one wholly."""
    mapping = VocabParallel("embedding", ("e",), (5, 1))
    shards = all_shards(mapping, {"e": torch.tensor([[1], [2], [3], [4], [5]])}, Sharding(0, 4, 4, 8))
    assert [labels(shard) for shard in shards] == [[1, 2], [3, 4], [5, 0], [0, 0]]


def test_a_rank_reads_only_its_slice() -> None:
    """Loading at TP 4 reads each value of the file exactly once over all ranks (norms excepted)."""
    for mapping in (
        QKV("qkv", ("q", "k", "v"), num_query_groups=4, heads_per_group=2, head_dim=2, columns=3),
        AttentionOutput("proj", ("o",), (3, 16), group_width=4),
        GatedMLP("fc1", ("gate", "up"), (8, 3)),
        RowParallel("fc2", ("down",), (3, 8)),
        VocabParallel("embedding", ("e",), (8, 3)),
    ):
        tensors = random_hf_tensors(mapping)
        shards = all_shards(mapping, tensors, Sharding(0, 4, 4, 8))
        held = sorted(value for shard in shards for value in labels(shard))
        assert held == sorted(value for tensor in tensors.values() for value in labels(tensor))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Mapping, Sharding]:
    """Any mapping of any small model at any layout that fits it."""
    tp_size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    groups, heads_per_group = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    head_dim, width = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    ffn, vocab = tp_size * draw(st.integers(1, 3)), draw(st.integers(1, 20))
    groups_padded = tp_size * (-(-groups // tp_size) + draw(st.integers(0, 1)))
    vocab_padded = tp_size * (-(-vocab // tp_size) + draw(st.integers(0, 3)))
    group_width = heads_per_group * head_dim
    mapping = draw(
        st.sampled_from(
            [
                Replicated("norm", ("n",), width),
                QKV("qkv", ("q", "k", "v"), groups, heads_per_group, head_dim, width),
                QKV("qkv_bias", ("q", "k", "v"), groups, heads_per_group, head_dim, None),
                AttentionOutput("proj", ("o",), (width, groups * group_width), group_width),
                FusedQKV("qkv", ("qkv",), groups, heads_per_group, head_dim, width),
                FusedQKV("qkv_bias", ("qkv",), groups, heads_per_group, head_dim, None),
                GatedMLP("fc1", ("gate", "up"), (ffn, width)),
                FusedGatedMLP("fc1", ("gate_up",), (ffn, width)),
                Replicated("router", ("r",), (ffn, width)),
                RowParallel("fc2", ("down",), (width, ffn)),
                VocabParallel("embedding", ("e",), (vocab, width)),
            ]
        )
    )
    return mapping, Sharding(0, tp_size, groups_padded, vocab_padded)


@settings(max_examples=200, deadline=None)
@given(layouts())
def test_round_trip_is_exact(layout: tuple[Mapping, Sharding]) -> None:
    """Shards of all ranks put together are the file again: every value, name and shape, padding gone."""
    mapping, sharding = layout
    tensors = random_hf_tensors(mapping)
    shards = all_shards(mapping, tensors, sharding)
    assert all(tuple(shard.shape) == mapping.megatron_shape(sharding) for shard in shards)
    back = mapping.to_hf(shards if mapping.split_dim is not None else shards[:1], sharding)
    assert back.keys() == tensors.keys() == set(mapping.hf_names)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@settings(max_examples=100, deadline=None)
@given(layouts())
def test_padding_is_zero(layout: tuple[Mapping, Sharding]) -> None:
    """What the shards hold beyond the file is zero, so a padded head contributes nothing and gets no gradient."""
    mapping, sharding = layout
    tensors = random_hf_tensors(mapping)
    shards = all_shards(mapping, tensors, sharding)
    held = sum(int(shard.count_nonzero()) for shard in (shards if mapping.split_dim is not None else shards[:1]))
    assert held == sum(tensor.numel() for tensor in tensors.values())


ARCH = Architecture("llama", 1, 4, 6, 3, 3, 2, 10, 16, 1e-6, 1e4, None, True, False, False)


@pytest.mark.parametrize(
    ("sharding", "named"),
    [
        (Sharding(0, 1, 2, 10), "num_query_groups_padded is 2"),
        (Sharding(0, 2, 3, 10), "num_query_groups_padded 3 does not divide by tensor-parallel size 2"),
        (Sharding(0, 2, 4, 9), "vocab_size_padded is 9"),
        (Sharding(0, 2, 4, 11), "vocab_size_padded 11"),
        (Sharding(0, 4, 4, 12), "ffn_hidden_size 6"),
    ],
)
def test_a_sharding_that_does_not_fit_is_refused(sharding: Sharding, named: str) -> None:
    """The message names the size and the divisor that failed."""
    with pytest.raises(LayoutError, match=named):
        sharding.check(ARCH)


def test_smallest_sharding_fits() -> None:
    """3 groups and 10 tokens at TP 2 become 4 groups and the next multiple of the vocabulary."""
    assert Sharding.smallest(ARCH, 1, 2) == Sharding(1, 2, 4, 10)
    assert Sharding.smallest(ARCH, 1, 2, vocab_multiple=8) == Sharding(1, 2, 4, 16)
