"""Vocabulary-parallel log-probabilities: shards over tensor-parallel ranks equal the dense formulas on the whole vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import kl_div

from oprd_megatron.objectives.vocab_parallel import (
    vocab_parallel_gather,
    vocab_parallel_kl,
    vocab_parallel_log_softmax,
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
        "kl": vocab_parallel_kl(*shards, group),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("vocab", "padded"), [(512, 512), (300, 512), (100, 512)])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_shards_equal_dense(tp: int, vocab: int, padded: int, dtype: torch.dtype) -> None:
    """log softmax, log p of a token and KL to 1e-5 nats, also where whole shards are padding; padded ids get probability 0."""
    ranks = run_ranks(tp, on_shards, vocab, padded, dtype)
    teacher, student, ids = inputs(vocab, padded, dtype)
    teacher, student = (logits[:, :vocab].double().log_softmax(-1) for logits in (teacher, student))
    log_probs = torch.cat([rank["log_probs"] for rank in ranks], dim=-1)
    assert log_probs.dtype == torch.float32
    assert log_probs[:, vocab:].isneginf().all()
    assert (log_probs[:, :vocab] - student).abs().max() <= TOLERANCE
    divergence = kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    for rank in ranks:
        assert (rank["gathered"] - student.gather(-1, ids[:, None])[:, 0]).abs().max() <= TOLERANCE
        torch.testing.assert_close(rank["kl"].double(), divergence, rtol=1e-5, atol=TOLERANCE)
