"""Rotary embeddings: the scalings of Hugging Face's `rope_type`s, and layers or sequences that differ in theirs.

mcore computes one table of angles a forward pass, position times inverse frequency, and every layer rotates its queries and
keys by it. Some architectures have two sets of frequencies:

    Gemma 3                 layers with a window have another base                  set 0: all others, set 1: these
    longrope (Phi-3, 128k)  sequences longer than the original length are           set 0: short, set 1: long
                            rotated by other frequencies

So the table here has a dimension for the set, and a layer takes what it needs out of it (`RotarySelfAttention`). A longrope
set is chosen for each sequence of a pack by its own length, as transformers does for a batch of one: what a sequence gives
must not depend on what it is packed with.

Legend: S positions, K sets, R rotated dimensions of a head (R/2 frequencies), P packed tokens over all context-parallel ranks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention

from checkpoints_conversion import Architecture
from checkpoints_conversion.architecture import LinearRope, Llama3Rope, LongRope
from oprd_megatron.errors import LayoutError


def has_two_sets(architecture: Architecture) -> bool:
    """Whether layers need `RotarySelfAttention`: there are two sets of frequencies to choose from."""
    return architecture.local_rotary_base is not None or isinstance(architecture.rope_scaling, LongRope)


def refuse_cut_sequences(architecture: Architecture, cp: int) -> None:
    """Context parallelism fills sequences up to a multiple of 2 cp, which must not carry one over the original length.

    Raises:
        LayoutError: it could.
    """
    rope = architecture.rope_scaling
    if isinstance(rope, LongRope) and cp > 1 and rope.original_max_position_embeddings % (2 * cp):
        raise LayoutError(
            f"cp {cp}: twice that must divide longrope's original_max_position_embeddings "
            f"{rope.original_max_position_embeddings}; choose another cp"
        )


class Rotary(RotaryEmbedding):
    """mcore's module with the frequencies of the architecture: angles [S, K, 1, R], mcore's own shape where K is 1."""

    def __init__(self, architecture: Architecture, device: torch.device, cp_group: Any) -> None:
        super().__init__(
            architecture.head_dim,
            architecture.rotary_fraction,
            rotary_base=architecture.rotary_base,  # type: ignore[arg-type]
            use_cpu_initialization=True,
            cp_group=cp_group,
        )
        self.inv_freq = inverse_frequencies(architecture).to(device)

    def get_emb(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """Angles of the positions from `offset` on."""
        positions = torch.arange(offset, offset + max_seq_len, device=self.inv_freq.device, dtype=torch.float32)
        angles = positions[:, None, None] * self.inv_freq
        return torch.cat((angles, angles), dim=-1).unsqueeze(2)


def inverse_frequencies(architecture: Architecture) -> torch.Tensor:
    """[K, R/2] fp32 on the CPU."""
    plain = _plain(architecture, architecture.rotary_base)
    scaling = architecture.rope_scaling
    if isinstance(scaling, LongRope):
        factors = torch.tensor((scaling.short_factors, scaling.long_factors), dtype=torch.float32)
        exponents = torch.arange(0, 2 * len(plain), 2).float() / (2 * len(plain))
        return 1.0 / (factors * architecture.rotary_base**exponents)
    if isinstance(scaling, LinearRope):
        plain = plain / scaling.factor
    elif isinstance(scaling, Llama3Rope):
        plain = _llama3(plain, scaling)
    if architecture.local_rotary_base is None:
        return plain.unsqueeze(0)
    return torch.stack((plain, _plain(architecture, architecture.local_rotary_base)))


def _plain(architecture: Architecture, base: float) -> torch.Tensor:
    """base^(-2i / R) for i = 0 .. R/2 - 1."""
    rotated = int(architecture.head_dim * architecture.rotary_fraction)
    return 1.0 / (base ** (torch.arange(0, rotated, 2).float() / rotated))


def _llama3(inv_freq: torch.Tensor, rope: Llama3Rope) -> torch.Tensor:
    """The formula of transformers' `llama3` rope type; mcore's own passes on only `factor`."""
    wavelength = 2 * math.pi / inv_freq
    low = rope.original_max_position_embeddings / rope.low_freq_factor
    high = rope.original_max_position_embeddings / rope.high_freq_factor
    smooth = (rope.original_max_position_embeddings / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
    return torch.where(wavelength > low, inv_freq / rope.factor, torch.where(wavelength < high, inv_freq, blended))


class RotarySelfAttention(SelfAttention):
    """mcore's self-attention that takes its own angles out of a `Rotary`'s two sets.

    A longrope's attention factor a multiplies sines and cosines, which is to rotate a times query and key.
    """

    def __init__(self, *args: Any, architecture: Architecture, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.long_rope = architecture.rope_scaling if isinstance(architecture.rope_scaling, LongRope) else None
        self.rotated = int(architecture.head_dim * architecture.rotary_fraction)
        windows = architecture.attention_windows
        self.set = int(bool(windows) and windows[self.layer_number - 1] is not None)

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        rotary_pos_emb: torch.Tensor,
        packed_seq_params: PackedSeqParams,
        **keywords: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As mcore's, with `rotary_pos_emb` [S, 2, 1, R]."""
        if self.long_rope is None:
            angles = rotary_pos_emb[:, self.set : self.set + 1]
        else:
            original = self.long_rope.original_max_position_embeddings
            angles = angles_by_length(rotary_pos_emb, packed_seq_params, original)
        return super().forward(
            hidden_states, *args, rotary_pos_emb=angles, packed_seq_params=packed_seq_params, **keywords
        )

    def get_query_key_value_tensors(self, *args: Any, **keywords: Any) -> Any:
        """Query, key and value; query and key not yet rotated."""
        query, key, value = super().get_query_key_value_tensors(*args, **keywords)
        if self.long_rope is not None and self.long_rope.attention_factor != 1.0:
            query, key = (self._scaled(x, self.long_rope.attention_factor) for x in (query, key))
        return query, key, value

    def _scaled(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        return torch.cat((x[..., : self.rotated] * factor, x[..., self.rotated :]), dim=-1)


def angles_by_length(angles: torch.Tensor, packing: PackedSeqParams, original: int) -> torch.Tensor:
    """Set 0 for sequences up to the original length, set 1 for longer ones.

    Args:
        angles: [S, 2, 1, R], S at least the longest sequence.
        packing: of the whole pack.

    Returns:
        [S, 1, 1, R] by position if no sequence is longer, else [P, 1, 1, R] by token of the pack. mcore tells the two
        apart by their length (`_apply_rotary_pos_emb_thd`), and they are the same where one sequence is the whole pack.
    """
    if packing.max_seqlen_q <= original:
        return angles[:, :1]
    bounds = packing.cu_seqlens_q.long()
    lengths = bounds.diff()
    position = torch.arange(int(bounds[-1]), device=bounds.device) - bounds[:-1].repeat_interleave(lengths)
    return angles[position, (lengths > original).long().repeat_interleave(lengths)].unsqueeze(1)
