"""The ranks that somebody started, against those that a run's layouts need. Read from the environment, before anything long."""

from __future__ import annotations

from collections.abc import Mapping

from oprd_megatron.config import RunConfig
from oprd_megatron.config.schema import ModelConfig, ParallelConfig
from oprd_megatron.errors import ConfigError, LayoutError
from oprd_megatron.launching.ranks import default_num_ranks

AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""Ranks meet in the store of torchrun's agents, where (torch 2.13) a new agent never finds the address, and ranks whose
agents have restarted them a different number of times look for each other under different names."""


def check_world(config: RunConfig, environment: Mapping[str, str]) -> None:
    """The ranks that somebody started, torchrun or by hand, on a rank.

    Raises:
        LayoutError: one line: their number, on how many nodes, and what is needed.
        ConfigError: torchrun was asked for restarts that would hang.
    """
    world, nodes = (int(environment.get(name, "1")) for name in ("WORLD_SIZE", "GROUP_WORLD_SIZE"))
    local = int(environment.get("LOCAL_WORLD_SIZE", world // nodes))  # without torchrun nobody says
    if nodes * local != world:
        raise LayoutError(
            f"{world} ranks on {nodes} nodes, of which this one has {local}; give every torchrun the same --nproc-per-node"
        )
    needed = default_num_ranks(config)
    if world != needed and not _takes_any(config):
        raise LayoutError(
            f"{nodes} {_nodes(nodes)} x {local} GPUs = {world} ranks, but the layouts need {needed} ({_layouts(config)}); "
            f"start {_advice(needed, local)}, or change the models' parallel sections"
        )
    if (
        nodes > 1
        and environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
        and environment.get(AGENT_STORE) == "True"
    ):
        raise ConfigError(
            "--max-restarts: a restart on several nodes would hang in torchrun's shared store; export "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, on every node, or leave --max-restarts out"
        )


def nodes_needed(config: RunConfig, per_node: int, environment: Mapping[str, str]) -> int:
    """Nodes that a run needs, before torchrun is started on any.

    Raises:
        LayoutError: no number of nodes fits, or SLURM gave another.
        ConfigError: nobody says where the nodes meet.
    """
    needed = default_num_ranks(config)
    if needed % per_node:
        raise LayoutError(
            f"the layouts need {needed} ranks ({_layouts(config)}), which is no number of nodes of {per_node} GPUs; set "
            "NPROC_PER_NODE to the GPUs of a node, or change the models' parallel sections"
        )
    nodes = needed // per_node
    given = environment.get("SLURM_NNODES")
    if given is not None and int(given) != nodes:
        raise LayoutError(
            f"SLURM gave {given} {_nodes(int(given))}, but the layouts need {needed} ranks ({_layouts(config)}) = {nodes} "
            f"{_nodes(nodes)} x {per_node} GPUs; ask for --nodes={nodes}, or change the models' parallel sections"
        )
    if given is None and nodes > 1 and not environment.get("MASTER_ADDR"):
        raise ConfigError(
            f"{nodes} nodes x {per_node} GPUs have to meet somewhere; set MASTER_ADDR to the first node's address, the same on "
            "every node (and NPROC_PER_NODE to the GPUs of a node)"
        )
    return nodes


def _takes_any(config: RunConfig) -> bool:
    """Whether some model's dp is what remains of the ranks."""
    return any(model.parallel.dp is None and model.parallel.ranks is None for model in _models(config).values())


def _models(config: RunConfig) -> dict[str, ModelConfig]:
    teachers: dict[str, ModelConfig] = {teacher.name: teacher for teacher in config.teachers}
    return {**(teachers or {"teacher": config.teacher}), "student": config.student}


def _layouts(config: RunConfig) -> str:
    def product(parallel: ParallelConfig) -> str:
        sizes = (("tp", parallel.tp), ("cp", parallel.cp), ("pp", parallel.pp), ("dp", parallel.dp or 1))
        return " x ".join(f"{axis} {size}" for axis, size in sizes if size > 1) or "1 rank"

    return ", ".join(f"{name}: {product(model.parallel)}" for name, model in _models(config).items())


def _advice(needed: int, per_node: int) -> str:
    if needed % per_node:
        return f"{needed} ranks in all"
    return f"{needed // per_node} {_nodes(needed // per_node)} of {per_node}"


def _nodes(count: int) -> str:
    return "node" if count == 1 else "nodes"
