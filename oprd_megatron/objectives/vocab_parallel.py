"""Log-probabilities over a vocabulary that is sharded over tensor-parallel ranks; nothing is gathered to full width.

Legend: N tokens, V vocabulary (without padding), V_local rows of the head on this rank. Rank r holds ids
[r * V_local, (r + 1) * V_local); ids from V on are padding and have probability zero.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def vocab_parallel_log_softmax(logits: torch.Tensor, vocab_size: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Shard of log softmax. Collectives: two all-reduces of N numbers over `group`.

    Args:
        logits: [N, V_local], any float dtype.
        vocab_size: V.
        group: tensor-parallel group.

    Returns:
        [N, V_local] fp32; -inf at padded ids.
    """
    logits = logits.float()
    start = group.rank() * logits.size(-1)
    padding = torch.arange(start, start + logits.size(-1), device=logits.device) >= vocab_size
    logits = logits.masked_fill(padding, -torch.inf)
    highest = logits.amax(-1)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    total = (logits - highest.unsqueeze(-1)).exp().sum(-1)
    dist.all_reduce(total, group=group)
    return logits - (highest + total.log()).unsqueeze(-1)


def vocab_parallel_gather(log_probs: torch.Tensor, ids: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """log p(ids): [N] fp32 from a shard [N, V_local] and global ids [N]. Collectives: one all-reduce of N numbers."""
    local = ids - group.rank() * log_probs.size(-1)
    here = (local >= 0) & (local < log_probs.size(-1))
    picked = log_probs.gather(-1, local.clamp(0, log_probs.size(-1) - 1).unsqueeze(-1)).squeeze(-1)
    found = torch.where(here, picked, picked.new_zeros(()))
    dist.all_reduce(found, group=group)
    return found


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
