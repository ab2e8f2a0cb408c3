"""From an arrangement to what a rank feeds its model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from oprd_megatron.models import MicroBatch
from oprd_megatron.parallel.grid import Grid
from oprd_megatron.representation.placement import Arrangement, shard_of_pack

PAD_ID = 0
"""What packs are filled up with; it is never attended to by a real token and never supervised."""


def micro_batches(sequences: Sequence[Sequence[int]], arrangement: Arrangement, grid: Grid) -> list[MicroBatch]:
    """What a model's rank is fed of these token ids, pack by pack; nothing off the grid."""
    if not grid.is_member:
        return []
    coords, fed = grid.coords, []
    for number, pack in enumerate(arrangement.packs[coords.dp]):
        ids = np.full(pack.length, PAD_ID, dtype=np.int64)
        for sample, start in zip(pack.samples, pack.boundaries, strict=False):
            tokens = sequences[sample]
            ids[start : start + len(tokens)] = tokens
        share = shard_of_pack(ids, pack, coords.cp, grid.layout.cp)
        fed.append(MicroBatch(number, torch.from_numpy(share), pack.boundaries))
    return fed
