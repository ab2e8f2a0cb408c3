"""From the config to the engines: some ranks of the world hold one."""

from __future__ import annotations

import torch.distributed as dist

from oprd_megatron.config.schema import ModelConfig, RunConfig
from oprd_megatron.models import DTYPES
from oprd_megatron.parallel.agreement import together
from oprd_megatron.parallel.layout import GridLayout
from oprd_megatron.platform import Platform, available_cores
from oprd_megatron.rollout.engine import RolloutEngine
from oprd_megatron.rollout.hf_engine import HFEngine


def build_hf_engine(
    config: RunConfig, section: ModelConfig, layout: GridLayout, platform: Platform
) -> RolloutEngine | None:
    """This rank's embedded engine for one of the models, without weights yet; None if this rank holds none. Engines are on ranks
    of the model's grid, where its weights are. Collective."""
    holders = layout.spread(config.rollout.num_engines or default_num_engines(platform))
    engine = None
    with together(f"starting the rollout engine on {section.path}"):
        if dist.get_rank() in holders:
            engine = HFEngine(section.path, DTYPES[section.dtype], platform.device, config.rollout.batch_size)
    return engine


def default_num_engines(platform: Platform) -> int:
    """Every rank on GPUs. On CPU as many as there are cores: more would hold memory and wait for each other."""
    return dist.get_world_size() if platform.is_cuda else available_cores()
