"""A layout brought to life: mcore process groups for one model, passed to mcore as arguments.

Teacher and student each own a `Grid`. This is the only module that touches mcore's global `parallel_state`, which mcore
still reads for the random-number tracker and a shared gather buffer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection

from oprd_megatron.parallel.layout import Coords, GridLayout

AXES = ["tp", "cp", "ep", "dp", "pp"]


@dataclass(frozen=True)
class Grid:
    """This rank's view of one model's grid; a rank may not be on it.

    Attributes:
        layout: the whole grid as data.
        rank: this global rank.
        groups: process groups under mcore's names; None where this rank is not on the grid.
        pp_backward: a second pipeline group, for what goes backward.
    """

    layout: GridLayout
    rank: int
    groups: ProcessGroupCollection
    pp_backward: dist.ProcessGroup | None = None

    @property
    def is_member(self) -> bool:
        """Whether this rank holds a part of the model."""
        return self.rank in self.layout.ranks

    @property
    def coords(self) -> Coords:
        """Where this rank is on the grid. Only on members."""
        return self.layout.coords(self.rank)

    @property
    def is_first_stage(self) -> bool:
        return self.is_member and self.coords.pp == 0

    @property
    def is_last_stage(self) -> bool:
        return self.is_member and self.coords.pp == self.layout.pp - 1


def build_grid(layout: GridLayout) -> Grid:
    """Create the process groups of a layout. Collective: every rank of the world calls it, in the same order."""
    comm = HyperCommGrid([layout.tp, layout.cp, 1, layout.dp, layout.pp], AXES, rank_offset=layout.first_rank)
    tp, cp, ep, dp, pp = (comm.create_pg(axis) for axis in AXES)
    model = comm.create_pg(["tp", "pp"])
    dp_cp = comm.create_pg(["cp", "dp"])
    tp_cp = comm.create_pg(["tp", "cp"])
    tp_dp_cp = comm.create_pg(["tp", "cp", "dp"])
    everyone = comm.create_pg(AXES)
    stages = comm.get_rank_enum("pp")
    embedding = _group_of([sorted({ranks[0], ranks[-1]}) for ranks in stages])
    position = _group_of([[ranks[0]] for ranks in stages])
    groups = ProcessGroupCollection(
        tp=tp, cp=cp, ep=ep, dp=dp, pp=pp, mp=model, embd=embedding, pos_embd=position,
        dp_cp=dp_cp, tp_cp=tp_cp, tp_dp_cp=tp_dp_cp, intra_dp_cp=dp_cp, intra_dist_opt=everyone,
        expt_tp=tp, tp_ep=tp, tp_ep_pp=model, expt_dp=dp_cp, intra_expt_dp=dp_cp,
    )  # fmt: skip
    backward = _group_of(stages)
    for group in (pp, backward):
        if group is not None and group.size() > 1:
            dist.barrier(group)  # NCCL connects at a group's first call, which all its ranks must then make
    return Grid(layout, dist.get_rank(), groups, backward)


def init_mcore_globals(seed: int, tp_rank: int) -> None:
    """What mcore reads globally whatever groups it is given: its gather buffer and its random-number tracker."""
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True, tp_rank=tp_rank, ep_rank=0, etp_rank=0)


@contextlib.contextmanager
def as_parallel_state(grid: Grid) -> Iterator[None]:
    """Show a grid to mcore code that takes no groups (parts of checkpointing), for the length of the block."""
    groups = grid.groups
    shown = {
        "_TENSOR_MODEL_PARALLEL_GROUP": groups.tp,
        "_PIPELINE_MODEL_PARALLEL_GROUP": groups.pp,
        "_MODEL_PARALLEL_GROUP": groups.mp,
        "_CONTEXT_PARALLEL_GROUP": groups.cp,
        "_DATA_PARALLEL_GROUP": groups.dp,
        "_DATA_PARALLEL_GROUP_WITH_CP": groups.dp_cp,
    }
    before = {name: getattr(parallel_state, name) for name in shown}
    for name, group in shown.items():
        setattr(parallel_state, name, group)
    try:
        yield
    finally:
        for name, group in before.items():
            setattr(parallel_state, name, group)


@contextlib.contextmanager
def as_world(grid: Grid) -> Iterator[None]:
    """Let mcore code that gathers Python objects over the default process group (building an optimizer) do so over the grid,
    for the length of the block: other ranks of the world have no optimizer and do not take part."""
    everyone = grid.groups.intra_dist_opt
    originals: dict[str, Any] = {"all_gather_object": dist.all_gather_object, "get_world_size": dist.get_world_size}

    def all_gather_object(found: list[Any], value: Any, group: dist.ProcessGroup | None = None) -> None:
        originals["all_gather_object"](found, value, group=group or everyone)

    def get_world_size(group: dist.ProcessGroup | None = None) -> int:
        return int(originals["get_world_size"](group or everyone))

    for name, stand_in in (("all_gather_object", all_gather_object), ("get_world_size", get_world_size)):
        setattr(dist, name, stand_in)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _group_of(rank_lists: list[list[int]]) -> dist.ProcessGroup | None:
    """The group of these that this rank is in, None if it is in none. Collective."""
    group, _ = dist.new_subgroups_by_enumeration(rank_lists)
    return group
