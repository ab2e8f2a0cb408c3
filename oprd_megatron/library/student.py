"""Somebody else's student: which grid an mcore GPTModel lives on, read from its process groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.utils import unwrap_model

from oprd_megatron.errors import LayoutError
from oprd_megatron.parallel.grid import Grid
from oprd_megatron.parallel.layout import Coords, GridLayout


def told_by_first(grid: Grid, value: Any) -> Any:
    """The value of a replica's first rank (tp 0, cp 0, pp 0) on all its ranks. Collective over the replica; in pickles, which
    stay among this program's own ranks."""
    coords, layout, told = grid.coords, grid.layout, [value]
    if layout.cp > 1 and coords.tp == coords.pp == 0:
        dist.broadcast_object_list(told, src=layout.rank(replace(coords, cp=0)), group=grid.groups.cp)
    if layout.tp * layout.pp > 1:
        dist.broadcast_object_list(told, src=layout.rank(replace(coords, tp=0, pp=0)), group=grid.groups.mp)
    return told[0]


def is_first(grid: Grid) -> bool:
    """Whether this rank is its replica's first."""
    return grid.coords.tp == grid.coords.cp == grid.coords.pp == 0


def unwrapped(model: torch.nn.Module | Sequence[torch.nn.Module]) -> list[GPTModel]:
    """The GPTModel chunks inside what a loop trains: one module or a list, wrapped in mcore's DDP and Float16Module or not.

    Raises:
        LayoutError: something else is inside.
    """
    chunks = unwrap_model(list(model) if isinstance(model, list | tuple) else [model])
    for chunk in chunks:
        if not isinstance(chunk, GPTModel):
            raise LayoutError(
                f"attach: the model is a {type(chunk).__name__}; give mcore's GPTModel, or the list of its chunks"
            )
    return chunks


def grid_of(chunks: Sequence[GPTModel]) -> Grid:
    """The grid that a model lives on, from the groups that it was built with. Collective over the world.

    Raises:
        LayoutError: its ranks are not in Megatron's default order, or not all ranks of the world.
    """
    config, groups = chunks[0].config, chunks[0].pg_collection
    tp, cp, dp, pp = (group.size() for group in (groups.tp, groups.cp, groups.dp, groups.pp))
    found = [[int(block.layer_number) for block in chunk.decoder.layers] for chunk in chunks]
    mine = Coords(groups.tp.rank(), groups.pp.rank(), groups.dp.rank(), groups.cp.rank())
    everybody: list[tuple[Coords, list[list[int]]]] = [(mine, found)] * dist.get_world_size()
    dist.all_gather_object(everybody, (mine, found))
    if tp * cp * dp * pp != len(everybody):
        raise LayoutError(
            f"attach: tp {tp} x cp {cp} x pp {pp} x dp {dp} = {tp * cp * pp * dp}, but there are {len(everybody)} ranks; the "
            "student has to be on all of them"
        )
    stages = {coords.pp: layers for coords, layers in everybody}
    counts = tuple(len(stages[stage][chunk]) for chunk in range(len(chunks)) for stage in range(pp))
    layout = GridLayout(tp, pp, dp, bool(config.sequence_parallel), counts, cp=cp, vpp=len(chunks))
    for rank, (coords, layers) in enumerate(everybody):
        if coords != layout.coords(rank):
            raise LayoutError(
                f"attach: rank {rank} is {coords}, not {layout.coords(rank)}: only Megatron's default order of ranks "
                "(tp-cp-ep-dp-pp) is known; leave --use-tp-pp-dp-mapping out"
            )
        if layers != [list(layout.chunk_layers(coords.pp, chunk)) for chunk in range(len(chunks))]:
            raise LayoutError(
                f"attach: rank {rank} holds layers {layers}, which do not follow each other in the stages' order"
            )
    return Grid(layout, dist.get_rank(), groups)
