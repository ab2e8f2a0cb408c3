"""Supervised rows of a block on 1, 2 and 4 tensor-parallel ranks: which they are, in which order, and where gradients go."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from oprd_megatron.parallel import Coords
from oprd_megatron.representation.placement import TokenPlacement
from oprd_megatron.representation.rows import BlockRows, block_rows, gather_rows, selected_rows
from tests.ranks import run_ranks

PACK, WIDTH = 40, 3
CHOICES = [(1, 2, 3, 7, 9, 12, 13, 14, 15, 16, 17, 25, 26, 39), (), (30,), (0, 1), tuple(range(PACK))]
"""Supervised rows of the pack."""


def rows_of(positions: tuple[int, ...], sp: bool, rank: int, tp: int) -> BlockRows:
    """Each rank's own rows, or, where hidden states are replicated, shares of them; last positions first."""
    place, zero = np.array(positions, dtype=np.int64), np.zeros(len(positions), dtype=np.int64)
    shard, local = np.divmod(place, PACK // tp) if sp else (np.arange(len(place)) % tp, place)
    tokens = TokenPlacement(zero, zero, zero, place, shard, local, replicated=not sp)
    grid = SimpleNamespace(coords=Coords(rank, 0, 0), layout=SimpleNamespace(tp=tp))
    empty = tuple(torch.empty(0, dtype=torch.int64) for _ in range(tp))
    found = block_rows(tokens, np.arange(len(place))[::-1], grid, torch.device("cpu"))  # type: ignore[arg-type]
    return found.get(0, BlockRows(empty[rank], empty, zero, zero, not sp))


def hidden_states() -> torch.Tensor:
    """[PACK, 1, WIDTH]; every element says where it is."""
    return torch.arange(PACK * WIDTH, dtype=torch.float32).view(PACK, 1, WIDTH)


def on_ranks(sp: bool) -> list[dict[str, torch.Tensor]]:
    """Of each choice: what is selected, its order, and the hidden states' gradient by sum_n (n + 1) * rows[n], the same on
    every rank."""
    group, found = dist.group.WORLD, []
    rank, tp = group.rank(), group.size()
    for positions in CHOICES:
        block = rows_of(positions, sp, rank, tp)
        local = (hidden_states().chunk(tp)[rank] if sp else hidden_states()).clone().requires_grad_()
        rows = selected_rows(local, block, group)
        (rows * torch.arange(1.0, len(rows) + 1).unsqueeze(1)).sum().backward()
        own = hidden_states().flatten(0, 1)[[positions[token] for token in block.own_tokens]]
        gathered, tokens = gather_rows(own, block.by_rank, group), torch.from_numpy(block.tokens.copy())
        found.append({"rows": rows.detach(), "tokens": tokens, "gradient": local.grad, "gathered": gathered})
    return found


@pytest.mark.parametrize(("tp", "sp"), [(1, False), (2, False), (2, True), (4, True)])
def test_selected_rows(tp: int, sp: bool) -> None:
    """Every rank has all rows, in the order of `tokens`, also where ranks have none of their own; a gradient that is the same
    on all ranks reaches each selected row once and no other, whole on each rank where states are replicated."""
    for positions, *ranks in zip(CHOICES, *run_ranks(tp, on_ranks, sp), strict=True):
        order = ranks[0]["tokens"].tolist()
        assert sorted(order) == list(range(len(positions)))
        at = [positions[token] for token in order]
        expected = torch.zeros(PACK, 1, WIDTH)
        for number, position in enumerate(at, 1):
            expected[position] = number
        for rank in ranks:
            assert rank["tokens"].tolist() == order
            assert torch.equal(rank["rows"], hidden_states().flatten(0, 1)[at])
            assert torch.equal(rank["gathered"], rank["rows"])
        gradients = [torch.cat([rank["gradient"] for rank in ranks])] if sp else [rank["gradient"] for rank in ranks]
        for gradient in gradients:
            assert torch.equal(gradient, expected)
