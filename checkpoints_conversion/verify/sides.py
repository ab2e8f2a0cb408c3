"""One of the two models: its architecture, its tensors under Hugging Face names, its config and tokenizer."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from checkpoints_conversion.architecture import Architecture
from checkpoints_conversion.convert.megatron_source import MegatronSource
from checkpoints_conversion.convert.megatron_to_hf import companions_of
from checkpoints_conversion.families import mappings_for, read_architecture
from checkpoints_conversion.files.source import TensorSource
from checkpoints_conversion.formats import copy_companions, model_architecture, open_source, weight_format
from checkpoints_conversion.interop import check_same_model, find_checkpoint_dir, is_megatron, read_run_config
from checkpoints_conversion.torch_dist import read_common
from oprd_megatron.errors import CheckpointError


@dataclass(frozen=True)
class Side:
    """One model.

    Attributes:
        path: as the user gave it.
        kind: who computes it: transformers, or this project's mcore model.
        format: of its weights, in words.
        arch: what its config.json says.
        source: its tensors.
        companions: directory with its config.json and tokenizer.
        problems: what a Megatron checkpoint's own settings contradict, a line each.
        notes: what could not be compared, a line each.
    """

    path: Path
    kind: Literal["transformers", "megatron"]
    format: str
    arch: Architecture
    source: TensorSource
    companions: Path
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """Tensors that count: old rotary buffers, and a second copy of a tied head, are read by no model."""
        ignored = {"lm_head.weight"} if self.arch.tie_word_embeddings else set()
        return frozenset(name for name in self.source.names - ignored if not name.endswith(".rotary_emb.inv_freq"))

    @property
    def expected(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the architecture has, in the order of the table, and its shape."""
        rows = (row for row in mappings_for(self.arch).values() if row.exported)
        return {name: shape for row in rows for name, shape in row.hf_shapes.items()}


def open_side(path: Path, like: Path | None, other: Path, stack: contextlib.ExitStack) -> Side:
    """Open a Hugging Face model (directory or .gguf) or a Megatron checkpoint.

    Args:
        path: the model.
        like: Hugging Face directory that gives a Megatron checkpoint's config and tokenizer; None: what import left beside
            it, else those of `other`.
        other: the other model's path.
        stack: closes what was opened.

    Raises:
        CheckpointError: nothing there that is read, or it is torn.
    """
    if is_megatron(path) or path.name.endswith(".incomplete"):
        return _open_megatron(path, like, other, stack)
    source = open_source(path)
    stack.callback(source.close)
    kind = weight_format(path)
    arch = model_architecture(path)
    companions = path
    if kind == "gguf":
        companions = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        copy_companions(path, companions)
    return Side(path, "transformers", f"Hugging Face, {kind}", arch, source, companions)


def _open_megatron(path: Path, like: Path | None, other: Path, stack: contextlib.ExitStack) -> Side:
    directory = find_checkpoint_dir(path)
    companions = like or _companions(directory, other)
    arch = read_architecture(companions)
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    common, run_config = read_common(directory), read_run_config(directory)
    try:
        notes = tuple(check_same_model(arch, common, run_config, directory))
    except CheckpointError as error:  # to be reported beside the differences that it makes
        problems = (str(error),)
    source = MegatronSource(directory, arch)
    stack.callback(source.close)
    return Side(path, "megatron", "Megatron, torch_dist", arch, source, companions, problems, notes)


def _companions(directory: Path, other: Path) -> Path:
    try:
        return companions_of(directory)
    except CheckpointError:
        if (other / "config.json").is_file():
            return other
        raise
