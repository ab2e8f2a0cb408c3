"""A micro-batch as the models eat it: packed token ids, the boundaries of its sequences, and its number.

The number travels with the packing through every layer call. So a tap knows which micro-batch it sees also when the layer is
recomputed in backward, long after other micro-batches went forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class NumberedPack(PackedSeqParams):
    """mcore's description of a pack, and which micro-batch it is."""

    micro_batch: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """One pack as a rank feeds it.

    Attributes:
        number: within the schedule.
        ids: token ids of this context-parallel rank's share; [P / cp] int64.
        boundaries: cu_seqlens of the whole pack, over all context-parallel ranks.
    """

    number: int
    ids: torch.Tensor
    boundaries: Sequence[int]

    def packing(self, device: torch.device) -> NumberedPack:
        """cu_seqlens int32 on the device."""
        bounds = torch.tensor(self.boundaries, dtype=torch.int32, device=device)
        longest = max(stop - start for start, stop in zip(self.boundaries, self.boundaries[1:], strict=False))
        return NumberedPack(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            micro_batch=self.number,
        )
