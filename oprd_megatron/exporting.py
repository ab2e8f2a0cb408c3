"""From a checkpoint of a run to a Hugging Face directory, whatever layout wrote the checkpoint. No model is built."""

from __future__ import annotations

from pathlib import Path

from checkpoints_conversion.convert.megatron_to_hf import export_megatron
from checkpoints_conversion.convert.options import Options, Summary
from checkpoints_conversion.convert.progress import Progress
from checkpoints_conversion.weights import hf_dir_of
from oprd_megatron.checkpoint import find_checkpoint
from oprd_megatron.config import load_config
from oprd_megatron.errors import CheckpointError
from oprd_megatron.run_directory import CONFIG_FILE


def export_checkpoint(path: Path, out: Path) -> Summary:
    """Write the student of a run directory (its newest checkpoint) or of one checkpoint.

    Raises:
        CheckpointError: no checkpoint there, a torn one, or `out` is not empty.
    """
    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        raise CheckpointError(f"{path}: no checkpoint here; give a run directory that has one, or an iter_.. directory")
    config = load_config(checkpoint.parent.parent / CONFIG_FILE)
    return export_megatron(checkpoint, out, Options(), Progress(), like=hf_dir_of(config.student.path))
