"""A layout brought to life: mcore process groups for one model, passed to mcore as arguments.

Teacher and student each own a `Grid`. This is the only module that touches mcore's global `parallel_state`, which mcore
still reads for the random-number tracker and a shared gather buffer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection

from oprd_megatron.parallel.layout import Coords, GridLayout

AXES = ["tp", "cp", "ep", "dp", "pp"]


@dataclass(frozen=True)
class Grid:
    """This rank's view of one model's grid.

    Attributes:
        layout: the whole grid as data.
        coords: where this rank is on it.
        groups: process groups under mcore's names.
    """

    layout: GridLayout
    coords: Coords
    groups: ProcessGroupCollection

    @property
    def is_first_stage(self) -> bool:
        return self.coords.pp == 0

    @property
    def is_last_stage(self) -> bool:
        return self.coords.pp == self.layout.pp - 1


def build_grid(layout: GridLayout) -> Grid:
    """Create the process groups of a layout. Collective: every rank of the world calls it, in the same order."""
    comm = HyperCommGrid([layout.tp, 1, 1, layout.dp, layout.pp], AXES, rank_offset=layout.first_rank)
    tp, cp, ep, dp, pp = (comm.create_pg(axis) for axis in AXES)
    model = comm.create_pg(["tp", "pp"])
    tp_dp = comm.create_pg(["tp", "cp", "dp"])
    everyone = comm.create_pg(AXES)
    stages = comm.get_rank_enum("pp")
    embedding = _group_of([sorted({ranks[0], ranks[-1]}) for ranks in stages])
    position = _group_of([[ranks[0]] for ranks in stages])
    groups = ProcessGroupCollection(
        tp=tp, cp=cp, ep=ep, dp=dp, pp=pp, mp=model, embd=embedding, pos_embd=position,
        dp_cp=dp, tp_cp=tp, tp_dp_cp=tp_dp, intra_dp_cp=dp, intra_dist_opt=everyone,
        expt_tp=tp, tp_ep=tp, tp_ep_pp=model, expt_dp=dp, intra_expt_dp=dp,
    )  # fmt: skip
    return Grid(layout, layout.coords(dist.get_rank()), groups)


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


def _group_of(rank_lists: list[list[int]]) -> dist.ProcessGroup | None:
    """The group of these that this rank is in, None if it is in none. Collective."""
    group, _ = dist.new_subgroups_by_enumeration(rank_lists)
    return group
