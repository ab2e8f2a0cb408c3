"""From a checkpoint of a run to a Hugging Face directory, on one rank, whatever layout wrote the checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from checkpoints_conversion import check_model
from oprd_megatron.checkpoint import find_checkpoint, load_weights
from oprd_megatron.config import load_config
from oprd_megatron.config.schema import ParallelConfig
from oprd_megatron.errors import CheckpointError
from oprd_megatron.models import DTYPES, build_model
from oprd_megatron.parallel import resolve_layout
from oprd_megatron.parallel.grid import build_grid, init_mcore_globals
from oprd_megatron.platform import init_distributed, select_platform
from oprd_megatron.preflight import CONFIG_FILE
from oprd_megatron.trainer import export_student


def export_checkpoint(path: Path, out: Path) -> None:
    """Write the student of a run directory (its newest checkpoint) or of one checkpoint.

    Raises:
        CheckpointError: no checkpoint there, a torn one, or `out` is not empty.
    """
    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        raise CheckpointError(f"{path}: no checkpoint here; give a run directory that has one, or an iter_.. directory")
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out}: exists and is not empty; nothing is overwritten, choose another directory")
    run_dir = checkpoint.parent.parent
    config = load_config(run_dir / CONFIG_FILE)
    architecture = check_model(config.student.path)
    platform = select_platform("cpu")
    init_distributed(platform)
    layout = resolve_layout(
        ParallelConfig(), name="export", world_size=1, num_layers=architecture.num_layers, divisible={}
    )
    with platform.scope():
        grid = build_grid(layout)
        init_mcore_globals(config.run.seed, tp_rank=0)
    student = build_model(
        architecture,
        grid,
        platform,
        dtype=DTYPES[config.student.dtype],
        hf_dir=config.student.path,
        frozen=True,
    )
    load_weights(checkpoint, student, platform)
    export_student(student, config.student.path, out, overwrite=False)
    dist.destroy_process_group()
