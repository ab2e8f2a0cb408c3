"""What a run's `path` may be: a Hugging Face directory, or a Megatron checkpoint with its model's Hugging Face files beside it.

    hf_dir_of(path)           where config, tokenizer and templates are
    check_weights(path)       can it be loaded? without reading a weight
    open_weights(path, arch)  its tensors under Hugging Face names, any rows of them

A Megatron checkpoint is read row by row as a Hugging Face directory is, so that each rank reads what it holds, whatever layout
wrote it.
"""

from __future__ import annotations

import logging
from pathlib import Path

from checkpoints_conversion.architecture import Architecture
from checkpoints_conversion.convert.megatron_source import MegatronSource
from checkpoints_conversion.convert.megatron_to_hf import companions_of
from checkpoints_conversion.families import read_architecture
from checkpoints_conversion.files.source import TensorSource
from checkpoints_conversion.interop import check_same_model, find_checkpoint_dir, is_megatron, read_run_config
from checkpoints_conversion.reader import HFReader, check_model
from checkpoints_conversion.torch_dist import read_common
from oprd_megatron.errors import CheckpointError

logger = logging.getLogger(__name__)


def hf_dir_of(path: Path | str) -> Path:
    """The directory with a model's config.json and tokenizer: itself, or `hf` in or beside a Megatron checkpoint.

    Raises:
        CheckpointError: a Megatron checkpoint that is unfinished or of a format that is not read, or without these files.
    """
    path = Path(path)
    if not is_megatron(path):
        return path
    directory = find_checkpoint_dir(path)
    try:
        return companions_of(directory)
    except CheckpointError:
        raise CheckpointError(
            f"{directory}: a Megatron checkpoint without config.json and tokenizer; copy those of its model into "
            f"{directory.parent / 'hf'}"
        ) from None


def check_weights(path: Path) -> Architecture:
    """Check a model without reading any weight.

    Raises:
        CheckpointError: something is missing or torn, a tensor has another shape than config.json says, or the settings stored
            in a Megatron checkpoint are those of another model.
    """
    if not is_megatron(path):
        return check_model(path)
    directory, arch = find_checkpoint_dir(path), read_architecture(hf_dir_of(path))
    for note in check_same_model(arch, read_common(directory), read_run_config(directory), directory):
        logger.warning("%s", note)
    MegatronSource(directory, arch).close()
    return arch


def open_weights(path: Path, arch: Architecture) -> TensorSource:
    """The tensors of a model that `check_weights` has passed; close it.

    Raises:
        CheckpointError: it cannot be opened.
    """
    return MegatronSource(find_checkpoint_dir(path), arch) if is_megatron(path) else HFReader(path)
