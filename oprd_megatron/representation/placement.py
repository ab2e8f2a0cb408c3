"""Where every supervised token of a global batch lies on a model's grid. Pure data, no torch.distributed.

A global batch is a list of samples (rollouts) that every rank knows. Each model arranges them over its data-parallel
ranks and micro-batches; a micro-batch is a `Pack`: its samples one after the other, without padding between them but what
context and sequence parallelism need. Supervised tokens are numbered over the whole batch, sample by sample: that number
("token") is what teacher and student agree on, however differently they arrange the samples.

Context parallelism cuts every sample of a pack into 2 * cp equal parts; rank r holds parts r and 2 * cp - 1 - r, so that causal
attention is balanced (mcore's and Transformer Engine's convention for packed sequences). Sequence parallelism then cuts the
rank's share of the pack into tp equal, contiguous parts.

Legend: M supervised tokens of the global batch; P length of a pack; a row is a token's index in its pack.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from oprd_megatron.parallel.layout import GridLayout


@dataclass(frozen=True)
class Pack:
    """Samples of one micro-batch, packed.

    Attributes:
        samples: their ids, in order; none in a filler that only keeps a pipeline in step.
        spans: tokens that each takes up, its own and what fills it up to a multiple of 2 * cp; a last span without a sample
            fills the pack up to a multiple of what context and sequence parallelism divide it by, times the layout's
            `token_multiple`.
    """

    samples: tuple[int, ...]
    spans: tuple[int, ...]

    @property
    def length(self) -> int:
        """P, over all context-parallel ranks."""
        return sum(self.spans)

    @property
    def boundaries(self) -> list[int]:
        """Where the spans begin and end: cu_seqlens."""
        return list(accumulate(self.spans, initial=0))


@dataclass(frozen=True)
class Arrangement:
    """Samples of a global batch on one model's grid: `packs[dp][micro_batch]`. All data-parallel ranks have equally many."""

    packs: tuple[tuple[Pack, ...], ...]

    @property
    def num_micro_batches(self) -> int:
        return len(self.packs[0])


def arrange(
    lengths: Sequence[int], layout: GridLayout, micro_batch_size: int, micro_batch_tokens: int | None = None
) -> Arrangement:
    """Deal samples to data-parallel ranks and micro-batches.

    With virtual pipeline stages fillers round the number of micro-batches up to a multiple of pp, which mcore's interleaved
    schedule needs.

    Args:
        lengths: prompt + response tokens of each sample.
        layout: the model's grid.
        micro_batch_size: samples of a micro-batch, dealt in order.
        micro_batch_tokens: dynamic batching instead: at most this many tokens in a micro-batch (a longer sample goes alone),
            balanced over micro-batches and data-parallel ranks.
    """
    if micro_batch_tokens is None:
        blocks = _in_order(len(lengths), layout.dp, micro_batch_size)
    else:
        blocks = _balanced([_span(length, layout.cp) for length in lengths], layout.dp, micro_batch_tokens)
    count = max(1, *(len(row) for row in blocks))
    if layout.vpp > 1:
        count = -(-count // layout.pp) * layout.pp
    return Arrangement(
        tuple(tuple(_pack(block, lengths, layout) for block in [*row, *[()] * (count - len(row))]) for row in blocks)
    )


def _in_order(count: int, dp: int, size: int) -> list[list[tuple[int, ...]]]:
    """[dp][micro-batch] -> sample ids, each rank a contiguous part of the batch.

    Where one model's data-parallel size is a multiple of the other's, and so its ranks a part of the other's, the samples
    are a part of the other's too: states then stay where they are, or near.
    """
    assert count % (size * dp) == 0, f"{count} samples, {size * dp} at a time"
    share = count // dp
    return [
        [tuple(range(first, first + size)) for first in range(rank * share, (rank + 1) * share, size)]
        for rank in range(dp)
    ]


def _balanced(lengths: Sequence[int], dp: int, most: int) -> list[list[tuple[int, ...]]]:
    """[dp][micro-batch] -> sample ids: as few micro-batches as hold `most` tokens each, of nearly equal size.

    Longest first into the emptiest (Graham's rule). The full micro-batches are then dealt back and forth over the ranks.
    """
    order = sorted(range(len(lengths)), key=lambda sample: -lengths[sample])
    bins = -(-max(1, math.ceil(sum(lengths) / most)) // dp) * dp
    while True:
        heap: list[tuple[int, int]] = [(0, index) for index in range(bins)]
        blocks: list[list[int]] = [[] for _ in range(bins)]
        for sample in order:
            load, index = heapq.heappop(heap)
            blocks[index].append(sample)
            heapq.heappush(heap, (load + lengths[sample], index))
        if all(len(block) <= 1 or sum(lengths[s] for s in block) <= most for block in blocks):
            break
        bins += dp
    blocks.sort(key=lambda block: -sum(lengths[sample] for sample in block))
    rows: list[list[tuple[int, ...]]] = [[] for _ in range(dp)]
    for number, block in enumerate(blocks):
        turn, place = divmod(number, dp)
        rows[place if turn % 2 == 0 else dp - 1 - place].append(tuple(sorted(block)))
    return rows


def _span(length: int, cp: int) -> int:
    """Tokens that a sample takes up: a multiple of 2 * cp under context parallelism."""
    share = 2 * cp if cp > 1 else 1
    return -(-max(1, length) // share) * share


def _pack(samples: tuple[int, ...], lengths: Sequence[int], layout: GridLayout) -> Pack:
    whole = math.lcm(_span(1, layout.cp), layout.cp * (layout.tp if layout.sp else 1) * layout.token_multiple)
    spans = [_span(lengths[sample], layout.cp) for sample in samples]
    total = sum(spans)
    filler = -(-max(1, total) // whole) * whole - total
    return Pack(samples, (*spans, *([filler] if filler else [])))


@dataclass(frozen=True)
class TokenPlacement:
    """Arrays over the M supervised tokens.

    Attributes:
        dp, cp: data- and context-parallel rank that computes the token.
        micro_batch: its micro-batch on that rank.
        row: its row in the whole pack.
        shard: tensor-parallel rank that supervises it. Under sequence parallelism the rank that holds the row; else the
            state is replicated and the tokens of a micro-batch are split evenly, in order of their rows.
        local_row: its row in the block [P_local, 1] that rank (cp, shard) holds.
        replicated: every tensor-parallel rank holds the row (no sequence parallelism).
    """

    dp: np.ndarray
    cp: np.ndarray
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
    starts = np.concatenate([[0], np.cumsum([len(sample) for sample in positions])]).astype(np.int64)
    total = int(starts[-1])
    dp, cp, micro_batch, row, shard, local_row = (np.zeros(total, dtype=np.int64) for _ in range(6))
    for dp_rank, packs in enumerate(arrangement.packs):
        for index, pack in enumerate(packs):
            for sample, start, span in zip(pack.samples, pack.boundaries, pack.spans, strict=False):
                tokens = slice(starts[sample], starts[sample + 1])
                place = np.asarray(positions[sample], dtype=np.int64)
                dp[tokens], micro_batch[tokens], row[tokens] = dp_rank, index, start + place
                cp[tokens], local_row[tokens] = context_share(place, start, span, layout.cp)
            if layout.sp:
                members = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in pack.samples] or [np.arange(0)])
                rows_per_rank = pack.length // (layout.cp * layout.tp)
                shard[members], local_row[members] = np.divmod(local_row[members], rows_per_rank)
    if not layout.sp and layout.tp > 1:
        shard = even_shares(np.stack([dp, cp, micro_batch]), row, layout.tp)
    return TokenPlacement(dp, cp, micro_batch, row, shard, local_row, replicated=not layout.sp)


def context_share(place: np.ndarray, start: int, span: int, cp: int) -> tuple[np.ndarray, np.ndarray]:
    """(context-parallel rank, row in its share of the pack) of positions `place` of a span that begins at `start`."""
    if cp == 1:
        return np.zeros_like(place), start + place
    part, offset = np.divmod(place, span // (2 * cp))
    second = part >= cp
    rank = np.where(second, 2 * cp - 1 - part, part)
    return rank, start // cp + offset + np.where(second, span // (2 * cp), 0)


def even_shares(block: np.ndarray, row: np.ndarray, tp: int) -> np.ndarray:
    """Split the tokens of each block (equal columns of `block`) evenly into tp shares, in order of their rows."""
    order = np.lexsort((row, *block))
    first = np.flatnonzero(np.concatenate([[True], np.any(np.diff(block[:, order], axis=1), axis=0)]))[: len(order)]
    sizes = np.diff(np.append(first, len(order)))
    within = np.arange(len(order)) - np.repeat(first, sizes)
    shares = np.empty(len(order), dtype=np.int64)
    shares[order] = within * tp // np.repeat(sizes, sizes) if len(order) else within
    return shares


def shard_of_pack(ids: np.ndarray, pack: Pack, cp_rank: int, cp: int) -> np.ndarray:
    """The tokens of a pack [P, ..] that a context-parallel rank holds, in its order: [P / cp, ..]."""
    if cp == 1:
        return ids
    kept = []
    for start, span in zip(pack.boundaries, pack.spans, strict=False):
        part = span // (2 * cp)
        for number in (cp_rank, 2 * cp - 1 - cp_rank):
            kept.append(ids[start + number * part : start + (number + 1) * part])
    return np.concatenate(kept)
