"""From the config to the engines: some ranks of the world hold one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.distributed as dist

from oprd_megatron.config.schema import ModelConfig, RunConfig
from oprd_megatron.errors import ConfigError
from oprd_megatron.models import DTYPES
from oprd_megatron.parallel.agreement import together
from oprd_megatron.parallel.layout import GridLayout
from oprd_megatron.platform import Platform, available_cores
from oprd_megatron.rollout.engine import RolloutEngine
from oprd_megatron.rollout.file_engine import FileEngine
from oprd_megatron.rollout.hf_engine import HFEngine
from oprd_megatron.rollout.vllm.build import Student, make_colocated, make_server_engine, start_servers

MakeEngine = Callable[[], RolloutEngine | None]


def prepare_engine(student: Student, layout: GridLayout, platform: Platform) -> MakeEngine:
    """Begin what takes long, such as a server's start, while models load. Collective.

    Args:
        student: of the run.
        layout: the student's.
        platform: of this rank.

    Returns:
        What makes this rank's engine for the student, without weights yet, or None if this rank holds none; collective too.
    """
    config = student.config
    kind, what = config.rollout.engine, f"starting the rollout engine on {student.path}"
    if kind == "hf":
        return partial(build_hf_engine, config, config.student, layout, platform)
    holds = dist.get_rank() == layout.first_rank
    started = []
    with together(what):
        if kind == "vllm_server" and holds:
            started = start_servers(student)
        if kind == "vllm" and layout.ranks != range(dist.get_world_size()):
            raise ConfigError(
                f"rollout.engine: vllm takes turns with the student on all ranks of the run, but the student is on "
                f"{len(layout.ranks)} of {dist.get_world_size()}; use vllm_server"
            )

    def make_engine() -> RolloutEngine | None:
        if kind == "vllm":
            return make_colocated(student)  # itself collective: a rank that fails ends the run
        with together(what):
            if not holds:
                return None
            if kind == "vllm_server":
                return make_server_engine(student, started)
            assert config.rollout.file is not None
            return FileEngine(config.rollout.file)

    return make_engine


def build_hf_engine(
    config: RunConfig, section: ModelConfig, layout: GridLayout, platform: Platform
) -> RolloutEngine | None:
    """This rank's embedded engine for one of the models, without weights yet; None if this rank holds none. Engines are on
    ranks of the model's grid, where its weights are. Collective."""
    holders = layout.spread(config.rollout.num_engines or default_num_engines(platform))
    engine = None
    with together(f"starting the rollout engine on {section.path}"):
        if dist.get_rank() in holders:
            engine = HFEngine(section.path, DTYPES[section.dtype], platform.device, config.rollout.batch_size)
    return engine


def default_num_engines(platform: Platform) -> int:
    """Every rank on GPUs. On CPU as many as there are cores: more would hold memory and wait for each other."""
    return dist.get_world_size() if platform.is_cuda else available_cores()
