"""A model on disk, in any format that is read: its config, its weights, and the files that belong to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoints_conversion import tokenizer
from checkpoints_conversion.architecture import Architecture
from checkpoints_conversion.families import FAMILIES, read_architecture
from checkpoints_conversion.families.base import read_config
from checkpoints_conversion.files.source import TensorSource
from checkpoints_conversion.formats.bin import BinSource
from checkpoints_conversion.formats.detect import gguf_file, weight_format
from checkpoints_conversion.formats.gguf import GGUFSource
from checkpoints_conversion.formats.gguf_companions import write_gguf_companions
from checkpoints_conversion.formats.gguf_config import gguf_config
from checkpoints_conversion.formats.gguf_model import GGUFModel
from checkpoints_conversion.reader import HFReader


def open_source(path: Path) -> TensorSource:
    """The weights of a model: a directory with safetensors, .bin or GGUF files, or a GGUF file.

    Raises:
        CheckpointError: nothing there, a format that is not read, or a file that is missing or damaged.
    """
    kind = weight_format(path)
    if kind == "safetensors":
        return HFReader(path)
    return BinSource(path) if kind == "bin" else GGUFSource(gguf_file(path))


def model_config(path: Path) -> dict[str, Any]:
    """config.json of a model; of a GGUF file, what it would be.

    Raises:
        CheckpointError: it is missing or broken, or the GGUF file is not understood.
    """
    if weight_format(path) != "gguf":
        return read_config(path)
    model = GGUFModel(gguf_file(path))
    try:
        return gguf_config(model)
    finally:
        model.close()


def model_architecture(path: Path) -> Architecture:
    """What model it is.

    Raises:
        CheckpointError: as `model_config`, or it asks for something this project does not implement.
    """
    if weight_format(path) != "gguf":
        return read_architecture(path)
    config = model_config(path)
    return FAMILIES[config["model_type"]].translate(config, gguf_file(path))


def copy_companions(path: Path, out_dir: Path) -> list[str]:
    """Put what belongs to a model beside its weights into an existing directory: config, tokenizer, templates, licence.

    Returns:
        What a user should know, one line each.

    Raises:
        CheckpointError: a companion leads out of the directory, or the GGUF file is not understood.
    """
    if weight_format(path) == "gguf":
        return write_gguf_companions(gguf_file(path), out_dir)
    tokenizer.copy_companions(path, out_dir)
    return []
