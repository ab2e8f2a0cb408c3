"""Entry point of a rank for `oprd eval`: score a student on the teacher's answers to held-out prompts.

torchrun --nproc-per-node N -m oprd_megatron.evaluate CONFIG.yaml OUT.json [CHECKPOINT] -- key.sub=value ..

Heavy modules are imported only once the libraries have been told to be quiet.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from oprd_megatron.config import RunConfig, load_config
from oprd_megatron.entry import one_line_errors, quiet_libraries
from oprd_megatron.errors import ConfigError


def evaluate(config: RunConfig, out: Path, checkpoint: Path | None) -> None:
    """Write one eval record to `out`.

    Args:
        config: its eval section says on what.
        out: json file.
        checkpoint: an iter_* directory with the student's weights; None takes `student.path` as it is.
    """
    import torch.distributed as dist

    from oprd_megatron.evaluation.several import Evaluation
    from oprd_megatron.logging import write_atomically
    from oprd_megatron.parallel.heartbeat import heartbeat
    from oprd_megatron.placing import build_all
    from oprd_megatron.platform import init_distributed, select_platform
    from oprd_megatron.preflight import preflight
    from oprd_megatron.representation.space import resume_bridge
    from oprd_megatron.rollout.build import build_hf_engine
    from oprd_megatron.rollout.weight_sync import sync_weights
    from oprd_megatron.saving.checkpoint import BRIDGE, load_weights

    if config.eval is None:
        raise ConfigError("eval: the config has no eval section; add eval.prompts.path")
    platform = select_platform(config.run.device)
    checked = preflight(config, int(os.environ.get("WORLD_SIZE", "1")), starts_run=False)
    init_distributed(platform)
    with heartbeat():
        teachers, student = build_all(checked, platform)
        if checkpoint is not None:
            load_weights(checkpoint, student, platform)
            if not config.teachers:
                resume_bridge(teachers[0].space, checkpoint / BRIDGE, checked.pairs, teachers[0].model, student)
        held_out = Evaluation(checked, teachers, student, platform)
        engine = build_hf_engine(config, config.student, student.grid.layout, platform)
        sync_weights(engine, student, version=0)
        record = held_out.record(0, engine, samples=True)
        if dist.get_rank() == 0:
            write_atomically(out, json.dumps(record, indent=1))
        dist.destroy_process_group()


if __name__ == "__main__":
    quiet_libraries()
    with one_line_errors():
        named, overrides = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
        evaluate(load_config(named[0], overrides), Path(named[1]), Path(named[2]) if len(named) > 2 else None)
