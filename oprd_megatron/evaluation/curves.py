"""How alike states are along a response: mean cosine over the first k tokens, and over the last k, for k = 1, 2, 4, ..

A cosine belongs to one supervised token and layer; a curve averages over layers and answers. Tokens fall into bins between
powers of two, counted from either end, so that little is kept and the curve is exact at every such k.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from oprd_megatron.config.distill import DistillConfig
from oprd_megatron.representation.alignment import OnCosines
from oprd_megatron.representation.batch import Chunk


class CosineCurves:
    """Sums over any number of batches.

    Args:
        config: which states are supervised.
        longest: tokens of the longest response.
        device: for collectives.
    """

    def __init__(self, config: DistillConfig, longest: int, device: torch.device) -> None:
        self.anchor, self.device = int(config.position_anchor == "predictor"), device
        self.config, self.ks = config, [2**power for power in range(max(1, longest).bit_length() + 1)]
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._sums = np.zeros((2, len(self.ks), 2))

    def of_chunk(self, chunk: Chunk) -> OnCosines:
        """What is called with (token numbers of the chunk [N], their cosines in one layer [N])."""
        first, last = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for sample in chunk.samples:
            places = np.asarray(sample.positions(self.config)[1], dtype=np.int64)
            index = places - len(sample.prompt_ids) + self.anchor
            first.append(index + 1)
            last.append(len(sample.response_ids) - index)
        bins = [np.searchsorted(self.ks, np.concatenate(counted)) for counted in (first, last)]

        def on_cosines(tokens: np.ndarray, cosines: torch.Tensor) -> None:
            values = cosines.double().cpu().numpy()
            for end, bin_of in enumerate(bins):
                np.add.at(self._sums[end, :, 0], bin_of[tokens], values)
                np.add.at(self._sums[end, :, 1], bin_of[tokens], 1)

        return on_cosines

    def record(self) -> dict[str, Any]:
        """{"k": [..], "first": [..], "last": [..]}, up to the first k that covers everything. Collective."""
        sums = torch.from_numpy(self._sums).to(self.device)
        dist.all_reduce(sums)
        totals = sums.cpu().numpy().cumsum(axis=1)
        shown = 1 + int(np.searchsorted(totals[0, :, 1], totals[0, -1, 1]))
        with np.errstate(invalid="ignore"):
            first, last = (totals[..., 0] / totals[..., 1])[:, :shown].tolist()
        finite = lambda values: [value if np.isfinite(value) else None for value in values]  # noqa: E731
        return {"k": self.ks[:shown], "first": finite(first), "last": finite(last)}
