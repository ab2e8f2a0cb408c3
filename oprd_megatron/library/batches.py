"""A micro-batch of somebody else's loop, and where its supervised tokens lie on the student's grid.

    hidden states of a layer    [S / cp / (tp if sp), B, D]     position s of sequence b: row s * B + b of the block
    a packed micro-batch        [T / cp / (tp if sp), 1, D]     sequences one after the other, T tokens in all

Context parallelism is Megatron's: rank r of cp holds parts r and 2 * cp - 1 - r of every sequence.

Supervised tokens are numbered over the global batch: data-parallel rank by rank, micro-batch by micro-batch, sequence by
sequence, ascending. Which they are follows from the response mask and `DistillConfig` (`positions`, `k`, `position_anchor`).

Legend: B sequences of a micro-batch; S their length; M supervised tokens of the global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from oprd_megatron.config.distill import DistillConfig
from oprd_megatron.errors import DataError
from oprd_megatron.parallel.layout import GridLayout
from oprd_megatron.representation.placement import TokenPlacement, context_share, even_shares
from oprd_megatron.representation.positions import choose


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch, whole: before context parallelism cuts it.

    Attributes:
        sequences: token ids [S_b] of each sequence, with its padding.
        responses: for each sequence [S_b] bool: this token is one that the student is taught on.
        loss_tokens: what `loss_func` returns as its number of tokens of this micro-batch, added up over context-parallel
            ranks; None: as many as are supervised.
        boundaries: of a packed micro-batch, where its sequences begin and end (the padded cu_seqlens; what only fills the pack
            up may be a last one); None: [B, S].
        states: teacher states that came with the batch, {teacher layer: [supervised tokens, C]}; None: the teacher is asked.
    """

    sequences: tuple[np.ndarray, ...]
    responses: tuple[np.ndarray, ...]
    loss_tokens: int | None = None
    boundaries: tuple[int, ...] | None = None
    states: dict[int, torch.Tensor] | None = None

    @classmethod
    def of(
        cls,
        tokens: torch.Tensor | np.ndarray,
        response: torch.Tensor | np.ndarray,
        loss_tokens: int | None = None,
        states: dict[int, torch.Tensor] | None = None,
    ) -> TokenBatch:
        """Of rectangular tensors: tokens [B, S], response [B, S] (not 0 where taught)."""
        ids, taught = (np.asarray(torch.as_tensor(value).cpu()) for value in (tokens, response))
        if ids.ndim != 2 or ids.shape != taught.shape:
            raise DataError(
                f"tokens are {list(ids.shape)} and the response mask {list(taught.shape)}; both must be [B, S]"
            )
        return cls(tuple(ids.astype(np.int64)), tuple(taught != 0), loss_tokens, states=states)

    def positions(self, config: DistillConfig) -> list[np.ndarray]:
        """Of each sequence the indices of its supervised states, ascending."""
        found = []
        for response in self.responses:
            places = np.flatnonzero(response)
            chosen = choose(len(places), config)
            places = places[chosen.start : chosen.stop] - (config.position_anchor == "predictor")
            found.append(places[places >= 0])
        return found


def megatron_batch(batch: dict[str, Any]) -> TokenBatch:
    """A micro-batch as Megatron-LM's GPT datasets give it: `tokens` and `loss_mask`, both [B, S].

    loss_mask[i] says whether the prediction of token i + 1 is trained; so that token, i + 1, is taught.
    """
    mask = torch.as_tensor(batch["loss_mask"]) != 0
    response = torch.zeros_like(mask)
    response[:, 1:] = mask[:, :-1]
    return TokenBatch.of(batch["tokens"], response, loss_tokens=int(mask.sum()))


@dataclass(frozen=True)
class Step:
    """All micro-batches of one step, the same on every rank.

    Attributes:
        sequences: what the teacher reads of each sequence: up to its last supervised token.
        positions: the indices of its supervised states.
        dp: data-parallel rank of each sequence.
        tokens: where the supervised tokens lie on the student's grid.
        loss_tokens: what all ranks' `loss_func` return as their number of tokens, added up over the step.
        num_micro_batches: of each data-parallel rank.
    """

    sequences: Sequence[np.ndarray]
    positions: Sequence[np.ndarray]
    dp: Sequence[int]
    tokens: TokenPlacement
    loss_tokens: int
    num_micro_batches: int

    @property
    def num_tokens(self) -> int:
        """M."""
        return len(self.tokens.row)

    @classmethod
    def of(cls, batches: Sequence[Sequence[TokenBatch]], layout: GridLayout, config: DistillConfig) -> Step:
        """Place `batches[dp][micro-batch]` on the student's grid.

        Raises:
            DataError: ranks with unequal numbers of micro-batches, or lengths that context or sequence parallelism cannot cut.
        """
        counts = {len(row) for row in batches}
        if len(counts) > 1:
            raise DataError(
                f"data-parallel ranks have {sorted(counts)} micro-batches; mcore's schedules want equally many"
            )
        sequences, positions, ranks, columns, loss_tokens = [], [], [], [], 0
        for rank, batches_of_rank in enumerate(batches):
            for number, batch in enumerate(batches_of_rank):
                places = batch.positions(config)
                kept = [
                    ids[: where[-1] + 1 if len(where) else 0]
                    for ids, where in zip(batch.sequences, places, strict=True)
                ]
                sequences += kept
                positions += places
                ranks += [rank] * len(places)
                supervised = sum(map(len, places))
                loss_tokens += supervised if batch.loss_tokens is None else batch.loss_tokens
                block = np.array([[rank], [number]]).repeat(supervised, axis=1)
                columns.append(np.concatenate([block, _places(batch, places, layout)]))
        dp, micro_batch, cp, row, shard, local_row = np.concatenate(columns, axis=1)
        if not layout.sp and layout.tp > 1:
            shard = even_shares(np.stack([dp, cp, micro_batch]), row, layout.tp)
        tokens = TokenPlacement(dp, cp, micro_batch, row, shard, local_row, replicated=not layout.sp)
        return cls(sequences, positions, ranks, tokens, loss_tokens, counts.pop())


def _places(batch: TokenBatch, positions: Sequence[np.ndarray], layout: GridLayout) -> np.ndarray:
    """(cp, row, shard, local row) of a micro-batch's supervised tokens, one after the other: [4, N]. The shard is the sequence
    parallel one, 0 where hidden states are replicated."""
    bounds, packed = batch.boundaries, batch.boundaries is not None
    if bounds is None:
        starts, spans = (0,) * len(positions), [len(ids) for ids in batch.sequences]
        total, width = max(spans), len(positions)
    else:
        starts, spans = bounds[:-1], [end - start for start, end in pairwise(bounds)]
        total, width = bounds[-1], 1
    _check_lengths(spans, total, layout, packed)
    per_rank = total // (layout.cp * layout.tp)
    columns = [np.zeros((4, 0), dtype=np.int64)]
    for number, (where, start, span) in enumerate(zip(positions, starts, spans, strict=False)):
        cp, local = context_share(where, start, span, layout.cp)
        shard = np.zeros_like(local)
        if layout.sp:
            shard, local = np.divmod(local, per_rank)
        lane = 0 if packed else number
        columns.append(np.stack([cp, (start + where) * width + lane, shard, local * width + lane]))
    return np.concatenate(columns, axis=1)


def _check_lengths(spans: list[int], total: int, layout: GridLayout, packed: bool) -> None:
    share = 2 * layout.cp if layout.cp > 1 else 1
    if not packed and len(set(spans)) > 1:
        raise DataError(
            f"sequences of {sorted(set(spans))} tokens in one micro-batch; pad them alike, or give boundaries"
        )
    bad = next((span for span in spans if span % share), None)
    if bad is not None:
        raise DataError(
            f"a sequence of {bad} tokens does not split into 2 x cp {layout.cp} parts; pad it to a multiple"
        )
    if layout.sp and total % (layout.cp * layout.tp):
        raise DataError(
            f"{total} tokens do not split over cp {layout.cp} x tp {layout.tp} with sp; pad them to a multiple"
        )
