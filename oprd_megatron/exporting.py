"""From a checkpoint of a run to a Hugging Face directory, whatever layout wrote the checkpoint. No model is built."""

from __future__ import annotations

from pathlib import Path

from checkpoints_conversion.convert.megatron_to_hf import export_megatron
from checkpoints_conversion.convert.options import Options, Summary
from checkpoints_conversion.convert.progress import Progress
from oprd_megatron.checkpoint import FOLDER, find_checkpoint
from oprd_megatron.config import load_config
from oprd_megatron.errors import CheckpointError
from oprd_megatron.retention import ranked
from oprd_megatron.run_directory import CONFIG_FILE


def export_checkpoint(path: Path, out: Path, best: bool = False) -> tuple[Path, Summary]:
    """Write the student of a run directory (its newest checkpoint, or its best) or of one checkpoint. Returns also which.

    Raises:
        CheckpointError: no checkpoint there, a torn one, or `out` is not empty; the run has no best one.
    """
    checkpoint = best_checkpoint(path) if best else find_checkpoint(path)
    if checkpoint is None:
        raise CheckpointError(f"{path}: no checkpoint here; give a run directory that has one, or an iter_.. directory")
    config = load_config(checkpoint.parent.parent / CONFIG_FILE)
    return checkpoint, export_megatron(checkpoint, out, Options(), Progress(), like=config.student.path)


def best_checkpoint(run_dir: Path) -> Path:
    """The best checkpoint of a run, by its `checkpoint.keep_best`.

    Raises:
        CheckpointError: the run does not say what is best, or none of its checkpoints was measured.
    """
    path = run_dir / CONFIG_FILE
    wanted = load_config(path).checkpoint.keep_best if path.is_file() else None
    if wanted is None:
        raise CheckpointError(f"{run_dir}: --best needs a run directory whose config has checkpoint.keep_best")
    found = ranked(run_dir / FOLDER, wanted)
    if not found:
        raise CheckpointError(
            f"{run_dir}: none of its checkpoints has the figure {wanted.measure}; export one by its path"
        )
    return found[0]
