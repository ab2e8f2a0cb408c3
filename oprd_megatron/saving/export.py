"""From a checkpoint of a run to a Hugging Face directory, whatever layout wrote the checkpoint. No model is built."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from checkpoints_conversion.convert.megatron_to_hf import export_megatron
from checkpoints_conversion.convert.options import Options, Summary
from checkpoints_conversion.convert.progress import Progress
from checkpoints_conversion.interop import find_checkpoint_dir, is_megatron
from checkpoints_conversion.weights import hf_dir_of
from oprd_megatron.config import RunConfig, load_config
from oprd_megatron.errors import CheckpointError
from oprd_megatron.run_directory.files import CONFIG_FILE
from oprd_megatron.saving.checkpoint import FOLDER, find_checkpoint
from oprd_megatron.saving.retention import ranked

HF_CONFIG = "config.json"
VLLM = ("vllm", "vllm_server")


def export_checkpoint(path: Path, out: Path, best: bool = False) -> tuple[Path, Summary]:
    """Write the student of a run directory (its newest checkpoint, or its best) or of one checkpoint. Returns also which.

    Raises:
        CheckpointError: no checkpoint there, a torn one, or `out` is not empty; the run has no best one.
    """
    checkpoint = best_checkpoint(path) if best else find_checkpoint(path)
    if checkpoint is None:
        raise CheckpointError(f"{path}: no checkpoint here; give a run directory that has one, or an iter_.. directory")
    config = load_config(checkpoint.parent.parent / CONFIG_FILE)
    return checkpoint, export_megatron(checkpoint, out, Options(), Progress(), like=hf_dir_of(config.student.path))


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


def checkpoint_of(weights: Path) -> Path | None:
    """The checkpoint that `--weights` names, a run directory's newest; None if it names a model that `student.path` could:
    a Hugging Face directory, or a Megatron checkpoint that is no run's.

    Raises:
        CheckpointError: nothing of that is there.
    """
    if (weights / HF_CONFIG).is_file():
        return None
    checkpoint = find_checkpoint(weights)
    if checkpoint is not None and (checkpoint.parent.parent / CONFIG_FILE).is_file():
        return checkpoint
    if not is_megatron(weights):
        raise CheckpointError(
            f"{weights}: neither a Hugging Face directory, a checkpoint (iter_..) nor a run that has one"
        )
    return None


@contextlib.contextmanager
def readable(weights: Path, config: RunConfig) -> Iterator[Path]:
    """What the run's engine can read of `weights`, a Hugging Face directory or a Megatron checkpoint: itself, or, for vLLM, a
    Hugging Face directory made of a checkpoint for as long as the block lasts, beside it and named as the student.

    Raises:
        CheckpointError: a checkpoint that is not read, or no room for the copy.
    """
    if config.rollout.engine not in VLLM or not is_megatron(weights):
        yield weights
        return
    checkpoint = find_checkpoint_dir(weights)
    with tempfile.TemporaryDirectory(prefix=".student_hf-", dir=checkpoint.parent) as folder:
        student = Path(folder, config.student.path.name)  # servers go by it
        export_megatron(checkpoint, student, Options(), Progress(), like=hf_dir_of(checkpoint))
        yield student
