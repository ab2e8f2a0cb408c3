"""What runs as other kernels on a GPU than on a CPU, against formulas on whole tensors in fp64.

Legend: P tokens of a pack, N query heads, G key/value heads, H head width; n rows, V vocabulary, D widths.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from oprd_megatron.config.output import FullTerm, SampledTerm, Term, TopKTerm
from oprd_megatron.models.attention import SDPACoreAttention
from oprd_megatron.objectives.fused_terms import TeacherHead, output_terms

from .models import relative, worst

LENGTHS = (300, 1, 77, 128)
N, G, H = 8, 2, 64
ROWS, VOCAB, PADDED, WIDTHS = 37, 1000, 1024, (64, 96)
TERMS: dict[str, Term] = {
    "full": FullTerm(kind="full"),
    "sampled": SampledTerm(kind="sampled"),
    "topk": TopKTerm(kind="topk", k=16),
}


def attention_off(device: str, dtype: torch.dtype, window: int | None) -> float:
    """The worst relative error of output and gradients of packed attention."""
    generator = torch.Generator().manual_seed(3)
    total = sum(LENGTHS)
    drawn = [torch.randn(total, heads, H, generator=generator) for heads in (N, G, G)]
    arriving = torch.randn(total, N * H, generator=generator)
    bounds = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32, device=device)
    packing = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    config = TransformerConfig(
        num_layers=1, hidden_size=N * H, num_attention_heads=N, num_query_groups=G, attention_dropout=0.0
    )
    core = SDPACoreAttention(config, pg_collection=ProcessGroupCollection(cp=dist.group.WORLD), windows=(window,))
    leaves = [x.to(device, dtype).clone().requires_grad_() for x in drawn]
    output = core(*leaves, None, packed_seq_params=packing)
    output.backward(arriving.to(device, dtype))
    exact = [x.double().requires_grad_() for x in drawn]
    expected = attention_formula(exact, window)
    expected.backward(arriving.double())
    pairs = [(output, expected), *((mine.grad, theirs.grad) for mine, theirs in zip(leaves, exact, strict=True))]
    return worst([relative(mine.detach().cpu(), theirs.detach()) for mine, theirs in pairs])  # type: ignore[union-attr]


def attention_formula(inputs: list[torch.Tensor], window: int | None) -> torch.Tensor:
    """softmax(Q K^T / sqrt(H) + causal mask) V of each sequence, from [P, N, H] and twice [P, G, H]: [P, N * H]."""
    pieces = []
    for q, k, v in zip(*(x.split(list(LENGTHS)) for x in inputs), strict=True):
        k, v = (x.repeat_interleave(N // G, dim=1) for x in (k, v))
        scores = torch.einsum("qnh,knh->nqk", q, k) * H**-0.5
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        if window is not None:
            hidden |= torch.ones(scores.shape[1:], dtype=torch.bool).tril(-window)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        pieces.append(torch.einsum("nqk,knh->qnh", weights, v).flatten(1))
    return torch.cat(pieces)


def term_off(name: str, device: str, dtype: torch.dtype) -> float:
    """The worst relative error of an output-space term's values and gradients on this rank's rows of the heads. Collective:
    the heads are split over all ranks of the world."""
    group = dist.group.WORLD
    assert group is not None
    rows, head, states, teacher_head = (x.to(dtype) for x in _term_inputs())
    targets = torch.randint(0, VOCAB, (ROWS,), generator=torch.Generator().manual_seed(6))
    weights = torch.rand(1, ROWS, generator=torch.Generator().manual_seed(7)) / ROWS
    shard = [x.chunk(group.size())[group.rank()].to(device) for x in (head, teacher_head)]
    mine = [x.clone().requires_grad_() for x in (rows.to(device), shard[0])]
    teacher = TeacherHead(states.to(device), shard[1])
    loss, values = output_terms(
        mine[0], mine[1], teacher, targets.to(device), [TERMS[name]], weights.to(device), VOCAB, group, chunk_tokens=16
    )
    loss.backward()
    exact = [x.double().requires_grad_() for x in (rows, head)]
    z, w = exact[0] @ exact[1][:VOCAB].T, states.double() @ teacher_head[:VOCAB].double().T
    expected, surrogate = term_formula(name, z, w, targets)
    (surrogate * weights[0]).sum().backward()
    assert exact[1].grad is not None
    pairs = [
        (values[0], expected),
        (mine[0].grad, exact[0].grad),
        (mine[1].grad, exact[1].grad.chunk(group.size())[group.rank()]),
    ]
    return worst([relative(a.detach().cpu(), b.detach()) for a, b in pairs])  # type: ignore[union-attr]


def _term_inputs() -> list[torch.Tensor]:
    """Student states [n, D] and head [padded V, D], and the teacher's. Rows of the heads that are padding are huge, so that
    reading one shows."""
    generator, made = torch.Generator().manual_seed(5), []
    for width in WIDTHS:
        head = 0.3 * torch.randn(PADDED, width, generator=generator)
        head[VOCAB:] = 1e3
        made += [torch.randn(ROWS, width, generator=generator), head]
    return made


def term_formula(
    name: str, z: torch.Tensor, w: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [n], what to differentiate [n]) from both models' logits [n, V]: Eq. 3 (sampled), Eq. 4 (top-k of the student,
    renormalised) and Eq. 5 (full, reverse)."""
    log_p, log_q = z.log_softmax(-1), w.log_softmax(-1)
    if name == "sampled":
        mine = log_p.gather(-1, targets[:, None])[:, 0]
        ratio = mine - log_q.gather(-1, targets[:, None])[:, 0]
        return ratio, ratio.detach() * mine
    if name == "topk":
        ids = z.topk(16, dim=-1).indices
        log_p, log_q = (x.gather(-1, ids).log_softmax(-1) for x in (log_p, log_q))
    value = (log_p.exp() * (log_p - log_q)).sum(-1)
    return value, value
