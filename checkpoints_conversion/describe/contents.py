"""A Hugging Face model or a Megatron checkpoint: who wrote it, what it holds, whether it is whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from checkpoints_conversion.architecture import Architecture
from checkpoints_conversion.convert.jobs import staging_of
from checkpoints_conversion.convert.megatron_source import MegatronSource
from checkpoints_conversion.convert.megatron_to_hf import companions_of
from checkpoints_conversion.convert.targets import read_manifest
from checkpoints_conversion.describe.description import Description, StoredTensorRow
from checkpoints_conversion.describe.tokenizers import tokenizer_line
from checkpoints_conversion.describe.unfinished import describe_unfinished
from checkpoints_conversion.families import mappings_for, read_architecture
from checkpoints_conversion.files.dtypes import ITEMSIZE
from checkpoints_conversion.files.messages import quoted, reason
from checkpoints_conversion.files.source import TensorSource
from checkpoints_conversion.formats import model_architecture, open_source, weight_format
from checkpoints_conversion.interop import check_same_model, find_checkpoint_dir, is_megatron, read_run_config
from checkpoints_conversion.interop.settings import CONVERTED_BY
from checkpoints_conversion.reader import check_tensors
from checkpoints_conversion.torch_dist import TorchDistReader, read_common
from oprd_megatron.errors import CheckpointError

_WEIGHTS = {"safetensors": "safetensors", "bin": "PyTorch .bin", "gguf": "GGUF"}
_SETTINGS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("vocab_size", "padded_vocab_size", "rotary_base", "num_experts", "num_moe_experts"),
)
"""Of a Megatron checkpoint without config.json, what tells models apart."""


def describe(path: Path) -> Description:
    """Say what is there.

    Raises:
        CheckpointError: nothing is, or nothing that is known.
    """
    path = path if path.name else path.absolute()
    staging = staging_of(path)
    if path.name.endswith(".incomplete") or (not path.exists() and staging.is_dir()):
        return describe_unfinished(path if path.name.endswith(".incomplete") else staging)
    found = _megatron(path) if is_megatron(path) else _hugging_face(path)
    if staging.is_dir():
        found.notes.append(f"{staging.name} beside it is an unfinished conversion to the same place")
    return found


def _hugging_face(path: Path) -> Description:
    kind = weight_format(path)
    manifest = _manifest(path)
    by = ", written by oprd convert export" if manifest is not None else ""
    found = Description(str(path), f"Hugging Face model, {_WEIGHTS[kind]}{by}")
    source: TensorSource | None = None
    try:
        found.architecture = arch = model_architecture(path)
        source = open_source(path)
        _fill(found, arch, source)
        found.notes += check_tensors(source, arch, path)
    except CheckpointError as error:
        found.problem = str(error)
    finally:
        if source is not None:
            source.close()
    if path.is_dir():
        found.tokenizer, notes = tokenizer_line(path)
        found.notes += notes
    else:
        found.tokenizer = "inside the file"
    return found


def _fill(found: Description, arch: Architecture, source: TensorSource) -> None:
    found.tensors = _sorted(
        StoredTensorRow(
            name, source.dtype(name), source.shape(name), _nbytes(source.dtype(name), source.shape(name)), 1
        )
        for name in source.names
    )
    found.files = _sizes(source.files)
    _sum_up(found, arch)


def _megatron(path: Path) -> Description:
    found = Description(str(path), "Megatron checkpoint")
    try:
        directory = find_checkpoint_dir(path)
        with TorchDistReader(directory) as reader:
            tensors = list(reader.tensors.values())
            found.what = f"Megatron checkpoint, torch_dist, by {_writer(directory, [tensor.key for tensor in tensors])}"
    except CheckpointError as error:
        found.problem = str(error)
        return found
    rows = (
        StoredTensorRow(each.key, each.dtype, each.shape, _nbytes(each.dtype, each.shape), len(each.chunks))
        for each in tensors
    )
    found.tensors = _sorted(rows)
    found.files = _sizes(sorted(directory.glob("*.distcp")))
    embedding = (each.shape[0] for each in tensors if each.key.endswith("embedding.word_embeddings.weight"))
    found.vocabulary_padded = next((rows for rows in embedding if rows), None)
    if directory != path:
        found.notes.append(f"the checkpoint itself is {directory}")
    _add_model(found, directory)
    return found


def _add_model(found: Description, directory: Path) -> None:
    """What model the checkpoint is of, by the config beside it or by its own settings."""
    common, run_config = read_common(directory), read_run_config(directory)
    arch = None
    try:
        companions = companions_of(directory)
        arch = found.architecture = read_architecture(companions)
        found.tokenizer, notes = tokenizer_line(companions)
        found.notes += notes
        source = MegatronSource(directory, arch)
        foreign = source.foreign_keys
        source.close()
        found.notes += check_same_model(arch, common, run_config, directory)
        if foreign:
            found.notes.append(f"{len(foreign)} tensors beside the model's, first {foreign[0]}")
    except CheckpointError as error:
        if arch is None:
            found.notes.append(str(error))
        else:
            found.problem = str(error)
    if arch is None:
        found.settings = _own_settings(common, run_config)
    _sum_up(found, arch)


def _writer(directory: Path, keys: list[str]) -> str:
    """Who wrote a torch_dist directory, as far as it tells."""
    common = read_common(directory)
    iteration = f", iteration {common['iteration']}" if type(common.get("iteration")) is int else ""
    if "oprd" in common:
        return f"a training run of this project{iteration}"
    if common.get("converted_by") == CONVERTED_BY:
        return "oprd convert import"
    if read_run_config(directory) is not None:
        return f"Megatron-Bridge{iteration}"
    if any(key.startswith("module.") for key in keys):
        return f"NeMo 2{iteration}"
    return f"Megatron-LM{iteration}" if "args" in common else f"an unknown writer{iteration}"


def _own_settings(common: Mapping[str, Any], run_config: Mapping[str, Any] | None) -> dict[str, Any]:
    model = (run_config or {}).get("model")
    args = common.get("args")
    given = model if isinstance(model, dict) else vars(args) if hasattr(args, "__dict__") else {}
    return {name: _short(given[name]) for name in _SETTINGS if given.get(name) is not None}


def _short(value: Any) -> Any:
    return value if isinstance(value, int | float) else quoted(value)


def _sum_up(found: Description, arch: Architecture | None) -> None:
    """Totals of what is stored, and the number of parameters."""
    found.nbytes = sum(tensor.nbytes for tensor in found.tensors)
    for tensor in found.tensors:
        found.dtypes[tensor.dtype] = found.dtypes.get(tensor.dtype, 0) + tensor.nbytes
    if arch is None:
        return
    rows = [row for row in mappings_for(arch).values() if row.exported]
    counts = {row.megatron_name: sum(math.prod(shape) for shape in row.hf_shapes.values()) for row in rows}
    found.parameters = found.active_parameters = sum(counts.values())
    if arch.experts is not None:
        of_experts = sum(count for name, count in counts.items() if ".local_experts." in name)
        idle = arch.experts.num_experts - arch.experts.top_k
        found.active_parameters = found.parameters - of_experts * idle // arch.experts.num_experts


def _manifest(path: Path) -> dict[str, Any] | None:
    try:
        return read_manifest(path) if path.is_dir() else None
    except CheckpointError:
        return None


def _sorted(rows: Iterable[StoredTensorRow]) -> list[StoredTensorRow]:
    return sorted(rows, key=lambda tensor: (-tensor.nbytes, tensor.name))


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * ITEMSIZE[dtype]


def _sizes(files: Iterable[Path]) -> list[tuple[str, int]]:
    return list(_stat(files))


def _stat(files: Iterable[Path]) -> Iterator[tuple[str, int]]:
    for file in files:
        try:
            yield file.name, file.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({reason(error)}); check the path") from None
