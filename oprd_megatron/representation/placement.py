"""Where every supervised token of a global batch lies on a model's grid. Pure data, no torch.distributed.

A global batch is a list of samples (rollouts) that every rank knows. Each model arranges them over its data-parallel
ranks and micro-batches; a micro-batch is a right-padded [S, B] block. Supervised tokens are numbered over the whole
batch, sample by sample: that number ("token") is what teacher and student agree on, however differently they
arrange the samples.

Legend: M supervised tokens of the global batch; S padded length and B samples of a micro-batch; a row is s * B + b, a
token's index in the flattened [S * B] block. Under sequence parallelism tensor-parallel rank r holds the block's
positions s in [r * S / tp, (r + 1) * S / tp).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from oprd_megatron.parallel.layout import GridLayout


@dataclass(frozen=True)
class Arrangement:
    """Samples of a global batch on one model's grid.

    Attributes:
        samples: `samples[dp][micro_batch]` is the tuple of sample ids in that micro-batch's columns.
        lengths: `lengths[dp][micro_batch]` is its padded length S.
    """

    samples: tuple[tuple[tuple[int, ...], ...], ...]
    lengths: tuple[tuple[int, ...], ...]

    @property
    def num_micro_batches(self) -> int:
        return len(self.samples[0])


def arrange(sample_lengths: Sequence[int], layout: GridLayout, micro_batch_size: int) -> Arrangement:
    """Deal samples to data-parallel ranks and micro-batches, in order.

    Every data-parallel rank gets the same number of micro-batches. S is a multiple of tp under sequence parallelism.

    Args:
        sample_lengths: prompt + response tokens of each sample.
        layout: the model's grid.
        micro_batch_size: B.
    """
    per_step = micro_batch_size * layout.dp
    assert len(sample_lengths) % per_step == 0, f"{len(sample_lengths)} samples, {per_step} at a time"
    multiple = layout.tp if layout.sp else 1
    samples, lengths = [], []
    for dp in range(layout.dp):
        columns = [
            tuple(range(first, first + micro_batch_size))
            for first in range(dp * micro_batch_size, len(sample_lengths), per_step)
        ]
        longest = [max(sample_lengths[sample] for sample in block) for block in columns]
        samples.append(tuple(columns))
        lengths.append(tuple(-(-length // multiple) * multiple for length in longest))
    return Arrangement(tuple(samples), tuple(lengths))


@dataclass(frozen=True)
class TokenPlacement:
    """Arrays over the M supervised tokens.

    Attributes:
        dp: data-parallel rank that computes the token.
        micro_batch: its micro-batch on that rank.
        row: its row in the micro-batch's whole (unsharded) block.
        shard: tensor-parallel rank that supervises it. Under sequence parallelism the rank that holds the row; else the
            state is replicated and the tokens of a micro-batch are split evenly, in order of their rows.
        local_row: its row in the block that tensor-parallel rank `shard` holds.
        replicated: every tensor-parallel rank holds the row (no sequence parallelism).
    """

    dp: np.ndarray
    micro_batch: np.ndarray
    row: np.ndarray
    shard: np.ndarray
    local_row: np.ndarray
    replicated: bool


def place_tokens(positions: Sequence[Sequence[int]], arrangement: Arrangement, layout: GridLayout) -> TokenPlacement:
    """Place every supervised token on a model's grid.

    Args:
        positions: for each sample its supervised sequence indices, ascending.
        arrangement: the model's arrangement of the samples.
        layout: the model's grid.
    """
    counts = [len(sample_positions) for sample_positions in positions]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    total = int(starts[-1])
    dp, micro_batch, row, shard, local_row = (np.zeros(total, dtype=np.int64) for _ in range(5))
    for dp_rank, blocks in enumerate(arrangement.samples):
        for index, block in enumerate(blocks):
            tokens = np.concatenate([np.arange(starts[sample], starts[sample + 1]) for sample in block])
            rows = np.concatenate(
                [np.asarray(positions[sample], dtype=np.int64) * len(block) + b for b, sample in enumerate(block)]
            )
            dp[tokens], micro_batch[tokens], row[tokens] = dp_rank, index, rows
            if layout.sp:
                rows_per_rank = arrangement.lengths[dp_rank][index] * len(block) // layout.tp
                shard[tokens], local_row[tokens] = rows // rows_per_rank, rows % rows_per_rank
            else:
                order = np.argsort(rows, kind="stable")
                shard[tokens[order]] = np.arange(len(tokens)) * layout.tp // max(1, len(tokens))
                local_row[tokens] = rows
    return TokenPlacement(dp, micro_batch, row, shard, local_row, replicated=not layout.sp)
