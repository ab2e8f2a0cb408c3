"""Numbers of a vocabulary that is sharded over tensor-parallel ranks: log-probabilities, what they are at a few ids, the k
likeliest ids, entropy, divergence. Nothing is gathered to full width.

Legend: N tokens, V vocabulary (without padding), V_local rows of the head on this rank, m ids of a token. Rank r holds ids
[r * V_local, (r + 1) * V_local); ids from V on are padding and have probability zero. Ids are global everywhere.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

KEY_ROWS = 32
"""Tokens whose top-k keys exist at a time: they are int64, twice as large as the logits."""
LOW_BITS = 0xFFFFFFFF


def vocab_parallel_log_softmax(logits: torch.Tensor, vocab_size: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Shard of log softmax. Collectives: two all-reduces of N numbers over `group`.

    Args:
        logits: [N, V_local], any float dtype.
        vocab_size: V.
        group: tensor-parallel group.

    Returns:
        [N, V_local] fp32; -inf at padded ids.
    """
    return vocab_parallel_log_softmax_(logits.to(torch.float32, copy=True), vocab_size, group)


def vocab_parallel_log_softmax_(logits: torch.Tensor, vocab_size: int, group: dist.ProcessGroup) -> torch.Tensor:
    """`vocab_parallel_log_softmax` in place of fp32 logits; one temporary of their size exists on the way."""
    exclude_padding_(logits, vocab_size, group)
    highest = logits.amax(-1)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    logits.sub_(highest.unsqueeze(-1))
    total = logits.exp().sum(-1)
    dist.all_reduce(total, group=group)
    return logits.sub_(total.log_().unsqueeze(-1))


def exclude_padding_(logits: torch.Tensor, vocab_size: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Write -inf at padded ids of [N, V_local]. Collectives: none."""
    logits[:, max(vocab_size - group.rank() * logits.size(-1), 0) :] = -torch.inf
    return logits


def vocab_parallel_gather(values: torch.Tensor, ids: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """What each token has at its ids, for example log p(ids).

    Args:
        values: shard [N, V_local].
        ids: [N] or [N, m] int64.
        group: tensor-parallel group. Collectives: one all-reduce of as many numbers as there are ids.

    Returns:
        The shape of `ids`, dtype of `values`, whole on every rank.
    """
    local, here = local_ids(ids, values.size(-1), group)
    found = values.gather(-1, local.view(len(values), -1)).view_as(ids).masked_fill_(~here, 0.0)
    dist.all_reduce(found, group=group)
    return found


def local_ids(ids: torch.Tensor, vocab_local: int, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """(index into this rank's shard, 0 for what other ranks hold; whether this rank holds it), both of the shape of `ids`."""
    local = ids - group.rank() * vocab_local
    here = (local >= 0) & (local < vocab_local)
    return local.masked_fill_(~here, 0), here


def vocab_parallel_top_k(
    values: torch.Tensor, k: int, vocab_size: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k ids of the largest values, largest first; of equal values the lower id first, so that the set is the same for
    every size of `group`.

    One integer says both: the high half of a key orders as the value does, the low half falls with the id. So keys are all
    different, their order is the rule above, and ranks exchange one tensor.

    Args:
        values: shard [N, V_local], any float dtype.
        k: at most V; may be larger than V_local.
        vocab_size: V; padded ids are never among the k.
        group: tensor-parallel group. Collectives: one all-gather of [N, min(k, V_local)] int64.

    Returns:
        ([N, k] int64, [N, k] fp32), the same on every rank.
    """
    assert k <= vocab_size, f"top {k} of {vocab_size} ids"
    start, kept = group.rank() * values.size(-1), min(k, values.size(-1))
    mine = torch.cat([_ordered_keys(part, start, vocab_size).topk(kept).values for part in values.split(KEY_ROWS)])
    by_rank = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(by_rank, mine, group=group)
    keys = torch.cat(by_rank, dim=-1).topk(k).values
    return LOW_BITS - (keys & LOW_BITS), _flip((keys >> 32).int()).view(torch.float32)


def _ordered_keys(values: torch.Tensor, start: int, vocab_size: int) -> torch.Tensor:
    """[n, V_local] int64: larger for a larger value, and for equal values larger for the lower id."""
    exact = values.float() + 0.0  # a copy, in which -0.0 is 0.0
    exact[:, max(vocab_size - start, 0) :] = -torch.inf
    ids = torch.arange(start, start + values.size(-1), device=values.device)
    return (_flip(exact.view(torch.int32)).long() << 32).add_(LOW_BITS - ids)


def _flip(bits: torch.Tensor) -> torch.Tensor:
    """fp32's bits as an int32 that orders as the number does, and back: of negative numbers all bits but the sign."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def top_k_overlap(ids: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Share of each token's ids [N, k] that are among its others [N, k]: [N] fp32. Collectives: none."""
    return is_among(ids, others).float().mean(-1)


def vocab_parallel_overlap(
    values: torch.Tensor, others: torch.Tensor, k: int, vocab_size: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """`top_k_overlap` of the k likeliest ids of two models, from shards [N, V_local] of logits or log-probabilities: [N] fp32.
    Collectives: two all-gathers of [N, min(k, V_local)] int64."""
    (ids, _), (other_ids, _) = (vocab_parallel_top_k(shard, k, vocab_size, group) for shard in (values, others))
    return top_k_overlap(ids, other_ids)


def is_among(ids: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Whether each of a token's ids [N, m] is one of its others [N, k]: [N, m] bool."""
    return (ids.unsqueeze(-1) == others.unsqueeze(-2)).any(-1)


def vocab_parallel_entropy(log_probs: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Entropy per token, in nats: [N] fp32 from a shard [N, V_local] of log-probabilities. Collectives: one all-reduce of N
    numbers."""
    probs = log_probs.exp()
    entropy = torch.special.entr(probs, out=probs).sum(-1)
    dist.all_reduce(entropy, group=group)
    return entropy


def vocab_parallel_kl(teacher: torch.Tensor, student: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """KL(teacher || student) per token, in nats.

    Args:
        teacher, student: shards of log-probabilities [N, V_local] from `vocab_parallel_log_softmax`.
        group: tensor-parallel group. Collectives: one all-reduce of N numbers.

    Returns:
        [N] fp32.
    """
    terms = teacher.exp() * (teacher - student)
    divergence = torch.where(teacher.isneginf(), torch.zeros_like(terms), terms).sum(-1)
    dist.all_reduce(divergence, group=group)
    return divergence
