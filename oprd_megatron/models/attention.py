"""Core attention on torch's scaled_dot_product_attention, where Transformer Engine is absent.

mcore's own fallback materialises the [B, heads, S, S] scores and refuses packed sequences. This one does neither, and
handles grouped queries. Causal masking is all that right-padded batches need: padding comes after every real token, so no
real token attends to it, and what padding itself computes is never read.

Legend: S tokens, B sequences, N query heads on this rank, G key/value heads on this rank, H head width, P packed tokens.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import scaled_dot_product_attention


class SDPACoreAttention(torch.nn.Module):
    """Causal self-attention over padded ([S, B, ..]) or packed ([P, ..] with cu_seqlens) tokens."""

    def __init__(self, config: TransformerConfig, *, softmax_scale: float | None = None, **_: object) -> None:
        super().__init__()
        assert config.context_parallel_size == 1, "SDPACoreAttention does not split sequences over context parallelism"
        assert config.attention_dropout == 0.0, "attention dropout is not supported"
        self.softmax_scale = softmax_scale

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
            query: [S, B, N, H], or [P, N, H] when packed.
            key, value: [S, B, G, H], or [P, G, H] when packed.
            attention_mask: must be None; the mask is causal.
            packed_seq_params: boundaries of the packed sequences (`cu_seqlens_q`).

        Returns:
            [S, B, N * H], or [P, N * H] when packed.
        """
        assert attention_mask is None, "only the causal mask is supported: pad on the right or pack"
        if packed_seq_params is None:
            attended = self._causal(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return attended.permute(2, 0, 1, 3).flatten(2)
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        pieces = [
            self._causal(*(x[start:end].transpose(0, 1).unsqueeze(0) for x in (query, key, value)))
            for start, end in pairwise(bounds)
        ]
        return torch.cat(pieces, dim=2).squeeze(0).transpose(0, 1).flatten(1)

    def _causal(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[B, N, S, H] x [B, G, S, H] -> [B, N, S, H]."""
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=query.size(1) != key.size(1)
        )
