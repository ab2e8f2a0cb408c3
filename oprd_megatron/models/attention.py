"""Core attention on torch's scaled_dot_product_attention, where Transformer Engine is absent.

mcore's own fallback materialises the scores of the whole batch and refuses packed sequences. This one attends one sequence of
a pack at a time, handles grouped queries, and splits sequences over context parallelism.

Context parallelism of size C follows mcore's packed ("thd") convention, the one its rotary embedding counts positions by
(megatron/core/models/common/embeddings/rope_utils.py, `_get_thd_freqs_on_this_cp_rank`). Every sequence, its length a
multiple of 2C, is cut into 2C equal chunks; rank r holds chunk r and then chunk 2C-1-r, an early one and a late one, so that
all ranks have the same causal work. A rank's pack is these pairs, sequence after sequence. With C = 2:

    natural    a0 a1 a2 a3 b0 b1 b2 b3
    rank 0     a0 a3 b0 b3
    rank 1     a1 a2 b1 b2

Queries stay where they are; keys and values are gathered, put back into natural order, and each chunk of queries attends
to the keys from its sequence's start to its own end.

With a sliding window of w positions, chunks are cut further into blocks of at most w queries, each of which attends to at most
2w - 1 keys: its own, and the w - 1 before them.

Legend: P packed tokens over all context-parallel ranks, C their number, N query heads on this rank, G key/value heads on
this rank, H head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention


class SDPACoreAttention(torch.nn.Module):
    """Causal self-attention within each sequence of a pack.

    A pure function of its inputs, so that mcore may run it again in backward (selective recomputation).

    Collectives over the context-parallel group, none if C = 1: one all-gather of [P/C, 2G, H] in forward, one reduce-scatter
    back to it in backward. A rank then holds the keys and values of the whole pack, its queries and outputs only.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        layer_number: int = 1,
        softmax_scale: float | None = None,
        windows: Sequence[int | None] = (),
        **_: object,
    ) -> None:
        """Called by mcore.

        Args:
            config: of the model.
            pg_collection: has the context-parallel group.
            layer_number: 1-based in the whole model.
            softmax_scale: factor on the scores; None for 1 / sqrt(H).
            windows: `Architecture.attention_windows`.
        """
        super().__init__()
        assert config.attention_dropout == 0.0, "attention dropout is not supported"
        self.softmax_scale = softmax_scale
        self.window = windows[layer_number - 1] if windows else None
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **_: object,
    ) -> torch.Tensor:
        """Attend causally within each sequence.

        Args:
            query: [P/C, N, H], this rank's chunks.
            key, value: [P/C, G, H], the same tokens.
            attention_mask: must be None; the mask is causal.
            packed_seq_params: boundaries of the sequences in the whole pack of P tokens (`cu_seqlens_q`).

        Returns:
            [P/C, N * H]
        """
        assert attention_mask is None, "only the causal mask is supported"
        assert packed_seq_params is not None, "only packed sequences are supported"
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        cp_rank, cp_size = self.cp_group.rank(), self.cp_group.size()
        assert query.size(0) * cp_size == bounds[-1], f"{cp_size} x {query.size(0)} tokens, pack of {bounds[-1]}"
        if cp_size > 1:
            pairs_local = torch.cat((key, value), dim=1)
            gathered = gather_from_sequence_parallel_region(pairs_local, group=self.cp_group)
            order = natural_order(packed_seq_params.cu_seqlens_q, cp_size)
            key, value = gathered.index_select(0, order).chunk(2, dim=1)
        spans = attention_spans(bounds, cp_rank, cp_size, self.window)
        return torch.cat([self._attend(query[rows], key[seen], value[seen]) for rows, seen in spans])

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[Q, N, H] x [K, G, H] -> [Q, N * H]; the queries are those of the last Q of the K tokens."""
        num_queries, num_keys = query.size(0), key.size(0)
        before = num_keys - num_queries
        mask = None
        if before > 0:  # is_causal would count queries from the first key
            mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(before)
            if self.window is not None:
                mask = mask.triu(before - self.window + 1)
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        attended = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        return attended.squeeze(0).transpose(0, 1).flatten(1)


def attention_spans(
    bounds: list[int], cp_rank: int, cp_size: int, window: int | None = None
) -> list[tuple[slice, slice]]:
    """What attends to what on one context-parallel rank.

    Args:
        bounds: first token of every sequence of the whole pack, and P.
        window: how many positions a query sees, its own included; None for all before it.

    Returns:
        (queries among this rank's tokens, keys among all P in natural order) of each chunk or block of it, in the order in
        which the rank holds them. A query chunk's keys end where it ends. Without context parallelism a sequence is one
        chunk.
    """
    spans = []
    for start, end in pairwise(bounds):
        chunks: tuple[int, ...] = (0,)
        width = end - start
        if cp_size > 1:
            chunks = (cp_rank, 2 * cp_size - 1 - cp_rank)
            width, rest = divmod(end - start, 2 * cp_size)
            assert rest == 0, f"a sequence of {end - start} tokens does not split into {2 * cp_size} chunks"
        for slot, chunk in enumerate(chunks):
            first_local, first = start // cp_size + slot * width, start + chunk * width
            step = window or max(width, 1)
            for block in range(0, width, step):
                size = min(step, width - block)
                seen_from = max(start, first + block - window + 1) if window else start
                rows = slice(first_local + block, first_local + block + size)
                spans.append((rows, slice(seen_from, first + block + size)))
    return spans


def natural_order(cu_seqlens: torch.Tensor, cp_size: int) -> torch.Tensor:
    """Index [P] (int64) that puts tokens gathered rank after rank into natural order: `natural = gathered[index]`.

    Args:
        cu_seqlens: [sequences + 1] boundaries in the whole pack of P tokens, integers.
    """
    lengths = cu_seqlens.diff()
    token = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    start, width = (x.long().repeat_interleave(lengths) for x in (cu_seqlens[:-1], lengths // (2 * cp_size)))
    chunk, offset = (token - start) // width, (token - start) % width
    rank = torch.minimum(chunk, 2 * cp_size - 1 - chunk)
    return rank * (token.numel() // cp_size) + start // cp_size + (chunk >= cp_size) * width + offset
