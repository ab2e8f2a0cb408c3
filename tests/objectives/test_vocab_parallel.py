"""Vocabulary-parallel log-probabilities: shards over tensor-parallel ranks equal the dense formulas on the whole vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import kl_div

from oprd_megatron.objectives.vocab_parallel import (
    top_k_overlap,
    vocab_parallel_entropy,
    vocab_parallel_gather,
    vocab_parallel_kl,
    vocab_parallel_log_softmax,
    vocab_parallel_overlap,
    vocab_parallel_top_k,
)
from tests.ranks import run_ranks

TOKENS = 23
TOLERANCE = 1e-5
"""Nats, on log-probabilities down to about -60: fp32 sums in another order."""


def inputs(vocab: int, padded: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(teacher logits, student logits) [N, padded] with huge values at padded ids, and ids [N] that reach both ends."""
    generator = torch.Generator().manual_seed(7)
    teacher, student = (8 * torch.randn(TOKENS, padded, generator=generator) for _ in range(2))
    for logits in (teacher, student):
        logits[:, vocab:] = 1e4
    ids = torch.randint(0, vocab, (TOKENS,), generator=generator)
    ids[0], ids[1] = 0, vocab - 1
    return teacher.to(dtype), student.to(dtype), ids


def on_shards(vocab: int, padded: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    group = dist.group.WORLD
    teacher, student, ids = inputs(vocab, padded, dtype)
    shards = [
        vocab_parallel_log_softmax(logits.chunk(group.size(), -1)[group.rank()], vocab, group)
        for logits in (teacher, student)
    ]
    return {
        "log_probs": shards[1],
        "gathered": vocab_parallel_gather(shards[1], ids, group),
        "gathered_more": vocab_parallel_gather(shards[1], torch.stack([ids, ids.flip(0), 0 * ids], dim=-1), group),
        "kl": vocab_parallel_kl(*shards, group),
        "entropy": vocab_parallel_entropy(shards[1], group),
        "overlap": vocab_parallel_overlap(*shards, 30, vocab, group),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("vocab", "padded"), [(512, 512), (300, 512), (100, 512)])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_shards_equal_dense(tp: int, vocab: int, padded: int, dtype: torch.dtype) -> None:
    """log softmax, log p of tokens, KL and entropy to 1e-5 nats, and the overlap of top sets, also where whole shards are
    padding; padded ids get probability 0."""
    ranks = run_ranks(tp, on_shards, vocab, padded, dtype)
    teacher, student, ids = inputs(vocab, padded, dtype)
    teacher, student = (logits[:, :vocab].double().log_softmax(-1) for logits in (teacher, student))
    log_probs = torch.cat([rank["log_probs"] for rank in ranks], dim=-1)
    assert log_probs.dtype == torch.float32
    assert log_probs[:, vocab:].isneginf().all()
    assert (log_probs[:, :vocab] - student).abs().max() <= TOLERANCE
    divergence = kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    top = [log_probs.topk(30).indices.tolist() for log_probs in (teacher, student)]
    shared = torch.tensor([len(set(one) & set(other)) / 30 for one, other in zip(*top, strict=True)])
    for rank in ranks:
        torch.testing.assert_close(
            rank["entropy"].double(), -(student.exp() * student).sum(-1), rtol=1e-5, atol=TOLERANCE
        )
        more = torch.stack([ids, ids.flip(0), 0 * ids], dim=-1)
        assert (rank["gathered_more"] - student.gather(-1, more)).abs().max() <= TOLERANCE
        if dtype == torch.float32:  # bfloat16 has ties at the border
            torch.testing.assert_close(rank["overlap"], shared)
        assert (rank["gathered"] - student.gather(-1, ids[:, None])[:, 0]).abs().max() <= TOLERANCE
        torch.testing.assert_close(rank["kl"].double(), divergence, rtol=1e-5, atol=TOLERANCE)


def values_with_ties(dtype: torch.dtype) -> torch.Tensor:
    """[37, 64]: many equal values, both signs and both zeros, numbers next to each other, ids at -inf; from 50 on padding."""
    draw = torch.Generator().manual_seed(2)
    values = torch.randint(-3, 4, (37, 64), generator=draw).float()
    values[:, 1:40:3] *= -0.0  # of either sign
    values[1], values[2] = 0.5, -torch.inf
    values[3, 10:] = -torch.inf
    values[4] = 1 + torch.arange(64).flip(0) * torch.finfo(dtype).eps
    values[5] = 1e4 * torch.randn(64, generator=draw)
    values[6] = -values[4]
    values[:, 50:] = torch.inf
    return values.to(dtype)


def tops_on_shards(dtype: torch.dtype, sizes: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    group = dist.group.WORLD
    shard = values_with_ties(dtype).chunk(group.size(), -1)[group.rank()]
    before = shard.clone()
    tops = [vocab_parallel_top_k(shard, k, 50, group) for k in sizes]
    assert torch.equal(shard, before) and vocab_parallel_top_k(shard[:0], 3, 50, group)[0].shape == (0, 3)
    return tops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_top_k_with_ties(tp: int, dtype: torch.dtype) -> None:
    """Values and ids are those of a stable sort of the whole row, so of equal values the lower id comes first, on every rank
    and for every number of them; also with k larger than a shard and as large as the vocabulary."""
    sizes = (1, 5, 16, 20, 50)
    values, order = values_with_ties(dtype)[:, :50].float().sort(dim=-1, descending=True, stable=True)
    for tops in run_ranks(tp, tops_on_shards, dtype, sizes):
        for k, (ids, found) in zip(sizes, tops, strict=True):
            assert torch.equal(ids, order[:, :k]) and torch.equal(found, values[:, :k])


def test_overlap_of_sets() -> None:
    """Shares of the ids, in whatever order they come."""
    ids, others = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]]), torch.tensor([[4, 3, 9, 8], [5, 6, 7, 8]])
    assert top_k_overlap(ids, others).tolist() == [0.5, 0.0]
