"""Which model, which tokenizer: hashes that a bridge keeps of the two models it was fitted for.

A bridge of two other models has fitting shapes and trains on nonsense without any error. Hashing all weights of a large model
takes minutes, so one row of each tensor stands for it:

    config      every field of the architecture that is not at its default (a field that a later version adds changes nothing)
    weights     of each tensor that the architecture names, in name order: name, shape, dtype, the bytes of its middle row along
                dim 0; a vector (norm, bias) whole

The same weights in one file or in many, in safetensors or .bin, have the same fingerprint. A copy in another dtype does not.

What this cannot see: a change that leaves the middle row of every matrix and all vectors as they are, such as a few rows of the
embedding or one block of one matrix edited by hand, or damage elsewhere in a file (`oprd convert verify` compares all values).
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, PositiveInt, StringConstraints

from checkpoints_conversion.architecture import Architecture
from checkpoints_conversion.convert.megatron_source import MegatronSource
from checkpoints_conversion.families import mappings_for
from checkpoints_conversion.files.dtypes import ITEMSIZE
from checkpoints_conversion.files.source import TensorSource
from checkpoints_conversion.formats.opening import open_source
from checkpoints_conversion.interop import is_megatron
from checkpoints_conversion.reader import check_tensors
from checkpoints_conversion.tokenizer import PROBES
from checkpoints_conversion.weights import open_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class ModelFingerprint(BaseModel):
    """What a bridge knows of one model. `path` and the sizes are for messages; `config` and `weights` identify it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    path: str
    """Where it lay, as the user gave it. Not compared: a model may be moved."""
    family: str
    width: PositiveInt
    layers: PositiveInt
    vocab: PositiveInt
    config: Sha256
    weights: Sha256

    def difference(self, other: ModelFingerprint) -> str | None:
        """What differs, in words; None for the same model."""
        for name in ("family", "width", "layers", "vocab"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} ({mine} and {theirs})"
        if self.config != other.config:
            return "config (their sizes are equal)"
        return "weights" if self.weights != other.weights else None


def model_fingerprint(path: Path, architecture: Architecture) -> ModelFingerprint:
    """The fingerprint of a model directory. Reads one row a tensor: a few MB of a 72B model.

    Args:
        path: Hugging Face directory (safetensors or .bin), or a Megatron checkpoint: of the same weights in the same dtype it
            has the same fingerprint.
        architecture: of this directory, as `read_architecture` returns it.

    Raises:
        CheckpointError: a weight file is missing or damaged, or a tensor is not what the architecture says.
    """
    source = open_weights(path, architecture) if is_megatron(path) else open_source(path)
    try:
        if not isinstance(source, MegatronSource):  # which has been compared with the architecture
            check_tensors(source, architecture, path, strict=False)
        weights = _weights_hash(source, architecture)
    finally:
        source.close()
    return ModelFingerprint(
        path=str(path),
        family=architecture.family,
        width=architecture.hidden_size,
        layers=architecture.num_layers,
        vocab=architecture.vocab_size,
        config=_hash_of(_settings(architecture)),
        weights=weights,
    )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of a tokenizer's vocabulary and of how it cuts a few texts. Chat templates and special tokens' roles do not
    count: they change prompts, not which token a state belongs to."""
    cut = [tokenizer(probe, add_special_tokens=False)["input_ids"] for probe in PROBES]
    return _hash_of([sorted(tokenizer.get_vocab().items()), cut])


def _settings(value: Any) -> Any:
    """A dataclass as its fields that are not at their defaults, nested ones too."""
    if not is_dataclass(value) or isinstance(value, type):
        return value
    found = {
        field.name: _settings(getattr(value, field.name))
        for field in fields(value)
        if not _is_default(field, getattr(value, field.name))
    }
    return [type(value).__name__, found]


def _is_default(field: Field[Any], value: Any) -> bool:
    return field.default is not MISSING and field.default == value


def _weights_hash(source: TensorSource, architecture: Architecture) -> str:
    """Tensors are read file by file (an old .bin is loaded whole), and hashed together in name order."""
    names = {name for mapping in mappings_for(architecture).values() for name in mapping.hf_shapes}
    hashes = {name: _tensor_hash(source, name) for name in sorted(names, key=lambda name: (source.file_of(name), name))}
    return _hash_of(sorted(hashes.items()))


def _tensor_hash(source: TensorSource, name: str) -> str:
    shape, dtype = source.shape(name), source.dtype(name)
    row, rows = (shape[0] // 2, 1) if len(shape) > 1 else (0, shape[0])
    data = bytearray(rows * math.prod(shape[1:]) * ITEMSIZE[dtype])
    source.read_into(name, row, rows, None, memoryview(data))
    return hashlib.sha256(json.dumps([shape, dtype]).encode() + b"\n" + data).hexdigest()


def _hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
