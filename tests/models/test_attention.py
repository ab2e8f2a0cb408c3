"""SDPACoreAttention against the formula, alone and split over context parallelism, in value and gradient.

Legend: P packed tokens over all context-parallel ranks, C their number, N query heads, G key/value heads, H head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed.tensor.debug import CommDebugMode

from oprd_megatron.models.attention import SDPACoreAttention, attention_spans, natural_order
from oprd_megatron.parallel.grid import init_mcore_globals
from oprd_megatron.platform import select_platform
from tests.ranks import run_ranks

N, H = 4, 8
LENGTHS = {1: [5, 1, 9], 2: [12, 4, 8], 4: [8, 24, 16]}
"""Sequences of a pack, for each C: multiples of 2C, one of them as short as can be."""
TOLERANCE = 1e-5
"""Largest difference allowed between fp32 and the formula in fp64; values and gradients are of order 1."""


@dataclass
class FakeGroup:
    """A process group of which only rank and size may be asked."""

    index: int
    ranks: int

    def rank(self) -> int:
        return self.index

    def size(self) -> int:
        return self.ranks


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def shard(whole: torch.Tensor, lengths: list[int], rank: int, cp_size: int) -> torch.Tensor:
    """A rank's chunks of every sequence of [P, ..], by the words of the convention; [P/C, ..]."""
    if cp_size == 1:
        return whole
    chunks = [sequence.chunk(2 * cp_size) for sequence in whole.split(lengths)]
    return torch.cat([held for of_one in chunks for held in (of_one[rank], of_one[2 * cp_size - 1 - rank])])


def pack(lengths: list[int], num_groups: int) -> list[torch.Tensor]:
    """Query [P, N, H], key and value [P, G, H], and the gradient [P, N * H] that arrives at the output."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(N, H), (num_groups, H), (num_groups, H), (N * H,)]
    return [torch.randn(sum(lengths), *shape, generator=generator) for shape in shapes]


def by_formula(
    lengths: list[int], inputs: list[torch.Tensor], scale: float | None, window: int | None = None
) -> list[torch.Tensor]:
    """Output and gradients of query, key and value: softmax(scale Q K^T + causal mask) V per sequence, in fp64. With a window,
    scores of keys `window` or more positions before the query are masked too."""
    query, key, value = leaves = [x.double().requires_grad_() for x in inputs[:3]]
    pieces = []
    for q, k, v in zip(*(x.split(lengths) for x in leaves), strict=True):
        k, v = (x.repeat_interleave(N // x.size(1), dim=1) for x in (k, v))
        scores = torch.einsum("qnh,knh->nqk", q, k) * (H**-0.5 if scale is None else scale)
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        if window is not None:
            hidden |= torch.ones(scores.shape[1:], dtype=torch.bool).tril(-window)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        pieces.append(torch.einsum("nqk,knh->qnh", weights, v).flatten(1))
    output = torch.cat(pieces)
    output.backward(inputs[3].double())
    return [output.detach(), *(x.grad for x in (query, key, value) if x.grad is not None)]


def core_attention(
    cp_group: Any, num_groups: int, scale: float | None = None, window: int | None = None
) -> SDPACoreAttention:
    """Layer 2 of two, of which it has the window."""
    config = TransformerConfig(
        num_layers=1, hidden_size=N * H, num_attention_heads=N, num_query_groups=num_groups, attention_dropout=0.0
    )
    groups = ProcessGroupCollection(cp=cp_group)
    return SDPACoreAttention(
        config, pg_collection=groups, layer_number=2, softmax_scale=scale, windows=(None, window) if window else ()
    )


def by_core_attention(
    cp_group: Any,
    lengths: list[int],
    inputs: list[torch.Tensor],
    scale: float | None = None,
    recompute: bool = False,
    window: int | None = None,
) -> list[torch.Tensor]:
    """This rank's output and gradients of query, key and value."""
    *leaves, arriving = (shard(x, lengths, cp_group.rank(), cp_group.size()) for x in inputs)
    leaves = [x.clone().requires_grad_() for x in leaves]
    core = core_attention(cp_group, inputs[1].size(1), scale, window)
    packing = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds(lengths), cu_seqlens_kv=bounds(lengths))

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return core(query, key, value, None, packed_seq_params=packing)

    with select_platform("cpu").scope():
        output = checkpoint(attend, False, *leaves) if recompute else attend(*leaves)
        output.backward(arriving)
    return [output.detach(), *(x.grad for x in leaves if x.grad is not None)]


def on_rank(num_groups: int, scale: float | None) -> list[torch.Tensor]:
    assert dist.group.WORLD is not None
    lengths = LENGTHS[dist.get_world_size()]
    return by_core_attention(dist.group.WORLD, lengths, pack(lengths, num_groups), scale)


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize(("num_groups", "scale"), [(2, None), (4, None), (1, 0.5)])
def test_equals_formula(cp_size: int, num_groups: int, scale: float | None) -> None:
    """Outputs and gradients of each rank's tokens are those of the formula on whole sequences."""
    expected = by_formula(LENGTHS[cp_size], pack(LENGTHS[cp_size], num_groups), scale)
    for rank, found in enumerate(run_ranks(cp_size, on_rank, num_groups, scale)):
        assert len(found) == len(expected) == 4
        for name, mine, whole in zip(("output", "query", "key", "value"), found, expected, strict=True):
            difference = (mine - shard(whole, LENGTHS[cp_size], rank, cp_size)).abs().max().item()
            assert difference <= TOLERANCE, f"{name} on rank {rank}: {difference}"


def windowed_on_rank(windows: list[int]) -> list[list[torch.Tensor]]:
    assert dist.group.WORLD is not None
    lengths = LENGTHS[dist.get_world_size()]
    return [by_core_attention(dist.group.WORLD, lengths, pack(lengths, 2), window=window) for window in windows]


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_windows_equal_formula(cp_size: int) -> None:
    """A query sees so many keys, its own included: one, less than a chunk, about one, across chunks, more than there are."""
    lengths, windows = LENGTHS[cp_size], [1, 2, 3, 4, 5, 7, 100]
    for rank, of_rank in enumerate(run_ranks(cp_size, windowed_on_rank, windows)):
        for window, found in zip(windows, of_rank, strict=True):
            expected = by_formula(lengths, pack(lengths, 2), None, window)
            for name, mine, whole in zip(("output", "query", "key", "value"), found, expected, strict=True):
                difference = (mine - shard(whole, lengths, rank, cp_size)).abs().max().item()
                assert difference <= TOLERANCE, f"{name} on rank {rank}, window {window}: {difference}"


@pytest.mark.parametrize("cp_size", [1, 2])
def test_a_window_bounds_the_scores(cp_size: int) -> None:
    """No block has more than window queries and 2 window - 1 keys; together they are all of a rank's queries, in order."""
    spans = attention_spans(bounds([48, 8]).tolist(), 0, cp_size, window=3)
    assert all(rows.stop - rows.start <= 3 and seen.stop - seen.start <= 5 for rows, seen in spans)
    assert [token for rows, _ in spans for token in range(rows.start, rows.stop)] == list(range(56 // cp_size))


def with_and_without_recomputation() -> list[list[torch.Tensor]]:
    assert dist.group.WORLD is not None
    lengths = LENGTHS[dist.get_world_size()]
    with select_platform("cpu").scope():
        init_mcore_globals(0, 0)
    return [by_core_attention(dist.group.WORLD, lengths, pack(lengths, 2), recompute=flag) for flag in (False, True)]


@pytest.mark.parametrize("cp_size", [1, 2])
def test_recomputation_changes_nothing(cp_size: int) -> None:
    """Attention run again in backward, as mcore's selective recomputation does, gives the same bits."""
    for kept, recomputed in run_ranks(cp_size, with_and_without_recomputation):
        assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def before_and_after_perturbing(perturbed: int) -> list[list[torch.Tensor]]:
    """This rank's results by sequence, as they are and with everything in sequence `perturbed` doubled."""
    assert dist.group.WORLD is not None
    cp_size = dist.get_world_size()
    lengths, runs = LENGTHS[cp_size], []
    for factor in (1, 2):
        inputs = pack(lengths, 2)
        for x in inputs:
            x.split(lengths)[perturbed].mul_(factor)
        results = by_core_attention(dist.group.WORLD, lengths, inputs)
        runs.append(list(torch.cat([x.flatten(1) for x in results], dim=1).split([n // cp_size for n in lengths])))
    return runs


@pytest.mark.parametrize("cp_size", [1, 2])
@pytest.mark.parametrize("perturbed", [0, 1, 2])
def test_sequences_do_not_see_each_other(cp_size: int, perturbed: int) -> None:
    """Another sequence in the pack changes no bit of a sequence's outputs and gradients."""
    for before, after in run_ranks(cp_size, before_and_after_perturbing, perturbed):
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert same == [number != perturbed for number in range(len(same))]


def collectives() -> dict[str, int]:
    assert dist.group.WORLD is not None
    lengths = LENGTHS[2]
    with CommDebugMode() as counted:
        by_core_attention(dist.group.WORLD, lengths, pack(lengths, 2))
    return {str(name): count for name, count in counted.get_comm_counts().items()}


def test_one_gather_and_one_reduce_scatter() -> None:
    """Keys and values travel together: one all-gather forward, one reduce-scatter backward, and nothing else."""
    for counts in run_ranks(2, collectives):
        assert counts == {"c10d._allgather_base_": 1, "c10d._reduce_scatter_base_": 1}


def test_alone_communicates_nothing() -> None:
    """Without context parallelism the group is never used: no process group exists here."""
    assert not dist.is_initialized()
    by_core_attention(FakeGroup(0, 1), LENGTHS[1], pack(LENGTHS[1], 2))


def test_natural_order_of_the_picture() -> None:
    """Tokens gathered as the module's docstring draws them come back in natural order."""
    gathered = ["a0", "a3", "b0", "b3", "a1", "a2", "b1", "b2"]
    order = natural_order(bounds([4, 4]), 2)
    assert [gathered[index] for index in order.tolist()] == sorted(gathered)


@pytest.mark.parametrize(("cp_size", "lengths"), [(2, [4]), (2, [12, 4, 8]), (3, [6, 30, 12]), (4, [8, 24, 16])])
def test_natural_order_undoes_sharding(cp_size: int, lengths: list[int]) -> None:
    """Shards of a ragged pack, one after the other, indexed by natural_order are the pack."""
    whole = torch.arange(sum(lengths))
    gathered = torch.cat([shard(whole, lengths, rank, cp_size) for rank in range(cp_size)])
    assert torch.equal(gathered[natural_order(bounds(lengths), cp_size)], whole)


@pytest.mark.parametrize("cp_size", [2, 4])
def test_ranks_share_the_work(cp_size: int) -> None:
    """Every rank computes the same number of scores: that is what the two chunks of a rank are for."""

    def scores(rank: int) -> int:
        spans = attention_spans(bounds(LENGTHS[cp_size]).tolist(), rank, cp_size)
        return sum((rows.stop - rows.start) * (seen.stop - seen.start) for rows, seen in spans)

    assert len({scores(rank) for rank in range(cp_size)}) == 1


def test_uneven_sequence_is_refused() -> None:
    """A sequence that does not split into 2C chunks is a mistake of whoever packed it."""
    with pytest.raises(AssertionError, match="10 tokens does not split into 4 chunks"):
        attention_spans([0, 4, 14], 0, 2)


@pytest.mark.parametrize("cp_size", [2, 4])
def test_rotary_counts_positions_by_the_same_layout(cp_size: int) -> None:
    """mcore's packed rotary embedding of a shard is the shard of the embedded pack."""
    lengths = LENGTHS[cp_size]
    query = pack(lengths, 2)[0]
    angles = torch.outer(torch.arange(max(lengths)), 0.1 ** torch.arange(H // 2))
    angles = torch.cat((angles, angles), dim=-1)[:, None, None]

    def rotated(x: torch.Tensor, group: FakeGroup) -> torch.Tensor:
        return _apply_rotary_pos_emb_thd(x, bounds(lengths), angles, cp_group=group)

    whole = rotated(query, FakeGroup(0, 1))
    for rank in range(cp_size):
        local = rotated(shard(query, lengths, rank, cp_size), FakeGroup(rank, cp_size))
        assert torch.equal(local, shard(whole, lengths, rank, cp_size))
