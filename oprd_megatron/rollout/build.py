"""From the config to an engine."""

from __future__ import annotations

from oprd_megatron.config.schema import ModelConfig, RunConfig
from oprd_megatron.models import DTYPES
from oprd_megatron.parallel.agreement import together
from oprd_megatron.platform import Platform
from oprd_megatron.rollout.engine import RolloutEngine
from oprd_megatron.rollout.hf_engine import HFEngine


def build_engine(config: RunConfig, section: ModelConfig, platform: Platform) -> RolloutEngine:
    """This rank's engine for one of the models, without weights yet. Collective."""
    with together(f"starting the rollout engine on {section.path}"):
        return HFEngine(section.path, DTYPES[section.dtype], platform.device, config.rollout.batch_size)
