"""Supervised rows of a micro-batch as index tensors on this rank, and how their values are gathered over tensor parallelism.

Legend: N rows of this rank, P_local tokens of the pack on it, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from oprd_megatron.parallel.grid import Grid
from oprd_megatron.representation.placement import TokenPlacement


@dataclass(frozen=True)
class BlockRows:
    """The supervised rows of one micro-batch, as this rank needs them.

    Attributes:
        mine: rows of the local block that this rank's loss covers; [N] int64.
        by_rank: the rows of every tensor-parallel rank, in rank order.
        tokens: token numbers of all of them, in the same order.
        own_tokens: token numbers of `mine`.
        replicated: every rank's block holds the rows of all of them (no sequence parallelism).
    """

    mine: torch.Tensor
    by_rank: tuple[torch.Tensor, ...]
    tokens: np.ndarray
    own_tokens: np.ndarray
    replicated: bool


def block_rows(tokens: TokenPlacement, order: np.ndarray, grid: Grid, device: torch.device) -> dict[int, BlockRows]:
    """{micro-batch: rows} of this rank's data- and context-parallel share; micro-batches without supervised tokens are left
    out.

    Args:
        tokens: where the supervised tokens lie on the grid.
        order: the plan's order of all tokens (`Route.order`); rows are in this order.
        grid: the model's.
        device: of the index tensors.
    """
    coords = grid.coords
    here = order[(tokens.dp[order] == coords.dp) & (tokens.cp[order] == coords.cp)]
    blocks = {}
    for micro_batch in np.unique(tokens.micro_batch[here]):
        members = here[tokens.micro_batch[here] == micro_batch]
        by_shard = [members[tokens.shard[members] == tp] for tp in range(grid.layout.tp)]
        by_rank = tuple(torch.from_numpy(tokens.local_row[shard]).to(device) for shard in by_shard)
        blocks[int(micro_batch)] = BlockRows(
            by_rank[coords.tp], by_rank, np.concatenate(by_shard), by_shard[coords.tp], tokens.replicated
        )
    return blocks


def gather_rows(mine: torch.Tensor, rows_by_rank: tuple[torch.Tensor, ...], group: dist.ProcessGroup) -> torch.Tensor:
    """Values of all ranks' rows, in rank order: [sum N, D] from this rank's [N, D].

    One all-gather of blocks padded to the longest share; none in a group of one.
    """
    if len(rows_by_rank) == 1:
        return mine
    longest = max(len(rows) for rows in rows_by_rank)
    padded = mine.new_zeros(longest, mine.size(-1))
    padded[: len(mine)] = mine
    gathered = [torch.empty_like(padded) for _ in rows_by_rank]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([block[: len(rows)] for block, rows in zip(gathered, rows_by_rank, strict=True)])


def selected_rows(hidden: torch.Tensor, rows: BlockRows, group: dist.ProcessGroup) -> torch.Tensor:
    """The supervised rows of a micro-batch on every tensor-parallel rank, in the order of `rows.tokens`.

    Backward expects a gradient that is whole and equal on all ranks of `group`. Where hidden states are replicated it is
    passed on as it is, whole on every rank; under sequence parallelism each rank takes its own rows of it.

    Args:
        hidden: [P_local, 1, D], any float dtype; the last stage's output.
        rows: of this micro-batch.
        group: tensor-parallel group. Collectives: under sequence parallelism one all-gather of the rows in forward; else
            none. Backward: none.

    Returns:
        [N, D], dtype of `hidden`, connected to it also for N = 0.
    """
    flat = hidden.flatten(0, 1)
    if rows.replicated:
        return flat.index_select(0, torch.cat(rows.by_rank))
    return GatherSequenceRows.apply(flat.index_select(0, rows.mine), rows.by_rank, group)


class GatherSequenceRows(torch.autograd.Function):
    """`gather_rows`, whose backward keeps this rank's rows of a gradient that is the same on all ranks. (mcore's gather from
    the sequence-parallel region would reduce-scatter, for partial gradients.)

    Forward: one all-gather over the group. Backward: no collectives.
    """

    @staticmethod
    def forward(
        ctx: Any, mine: torch.Tensor, by_rank: tuple[torch.Tensor, ...], group: dist.ProcessGroup
    ) -> torch.Tensor:
        start = sum(len(rows) for rows in by_rank[: group.rank()])
        ctx.own = slice(start, start + len(mine))
        return gather_rows(mine, by_rank, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return gradient[ctx.own], None, None
