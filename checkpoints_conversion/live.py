"""Weights of live, sharded models: load them from a Hugging Face directory, or stream them out under its names.

Loading needs no communication: each rank reads its own slices. Streaming is collective over one tensor x pipeline grid
and never holds more than one parameter in full: the owning stage broadcasts its shard along the pipeline, then every
stage gathers the shards of its tensor-parallel group.
"""

import re
from collections.abc import Iterator, Sequence
from collections.abc import Mapping as TensorMapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoints_conversion.architecture import Architecture, Sharding
from checkpoints_conversion.families import mappings_for
from checkpoints_conversion.mappings import Mapping
from checkpoints_conversion.reader import HFReader, check_tensors

FUSED_NORM_ALIASES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine's spec fuses a norm into the linear layer after it: name there -> name in the local spec."""

_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_STREAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""A dtype travels between stages as its position here plus one; zero means "not on this stage"."""


def canonical_parameters(model_chunks: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters of this rank's chunks by canonical name: local spec, 0-based global layer index.

    Args:
        model_chunks: unwrapped GPTModels (one, or several with virtual pipeline stages). The global index comes from
            `chunk.decoder.layers[i].layer_number`, which mcore counts from 1 over the whole model.
    """
    parameters: dict[str, nn.Parameter] = {}
    for chunk in model_chunks:
        for local_name, parameter in chunk.named_parameters():
            name = _canonical_name(local_name, chunk)
            assert name not in parameters, f"two parameters of this rank are {name}"
            parameters[name] = parameter
    return parameters


@torch.no_grad()
def load_hf_weights(
    model_chunks: Sequence[nn.Module], hf_dir: str | Path, sharding: Sharding, arch: Architecture
) -> None:
    """Fill this rank's parameters from a Hugging Face directory, in place, reading only this rank's slices.

    Values are cast to each parameter's dtype. Not collective: ranks may call it at different times.

    Args:
        model_chunks: unwrapped GPTModels of this rank.
        hf_dir: directory with config.json and safetensors.
        sharding: this rank's slice of the model.
        arch: what `check_model(hf_dir)` returned.

    Raises:
        CheckpointError: the directory is broken or does not hold this architecture.
        LayoutError: the sharding does not fit the architecture.
    """
    sharding.check(arch)
    table = mappings_for(arch)
    with HFReader(hf_dir) as reader:
        check_tensors(reader, arch, reader.hf_dir)
        for name, parameter in canonical_parameters(model_chunks).items():
            assert name in table, f"no mapping for parameter {name} of a {arch.family} model"
            _check_shape(parameter, table[name], sharding)
            table[name].load(parameter, reader.read, sharding)


@torch.no_grad()
def stream_hf_weights(
    model_chunks: Sequence[nn.Module],
    arch: Architecture,
    sharding: Sharding,
    tp_group: dist.ProcessGroup | None,
    pp_group: dist.ProcessGroup | None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the model under its Hugging Face name, whole, on every rank, in the order of the table.

    COLLECTIVE: all ranks of the grid must take every item. One broadcast over the pipeline and one all-gather over the
    tensor-parallel group a parameter (no gather for norms), plus one small all-gather at the start. A tied output layer
    is not yielded. Padding of heads and vocabulary is stripped.

    Args:
        model_chunks: unwrapped GPTModels of this rank.
        arch: the model.
        sharding: this rank's slice of it.
        tp_group: tensor-parallel group in `tp_rank` order; None for a group of one.
        pp_group: pipeline group; None for a group of one.

    Yields:
        (hf_name, tensor) with the parameter's dtype and device. A tensor may share memory with the model or with its
        neighbours: copy it to keep it beyond the next item or the next optimizer step.

    Raises:
        LayoutError: the sharding does not fit the architecture.
    """
    yield from stream_hf_tensors(canonical_parameters(model_chunks), arch, sharding, tp_group, pp_group)


@torch.no_grad()
def stream_hf_tensors(
    parameters: TensorMapping[str, Tensor],
    arch: Architecture,
    sharding: Sharding,
    tp_group: dist.ProcessGroup | None,
    pp_group: dist.ProcessGroup | None,
) -> Iterator[tuple[str, Tensor]]:
    """`stream_hf_weights` of any tensors shaped like this rank's parameters, such as their gradients.

    Args:
        parameters: by canonical name, all that `canonical_parameters` gives on this rank.
        arch, sharding, tp_group, pp_group: as for `stream_hf_weights`.
    """
    sharding.check(arch)
    table = [mapping for mapping in mappings_for(arch).values() if mapping.exported]
    device = next(iter(parameters.values())).device
    for mapping, (owner, dtype) in zip(table, _agree_on_owners(table, parameters, device, pp_group), strict=True):
        if mapping.megatron_name in parameters:
            parameter = parameters[mapping.megatron_name]
            _check_shape(parameter, mapping, sharding)
            shard = parameter.detach().contiguous()
        else:
            shard = torch.empty(mapping.megatron_shape(sharding), dtype=dtype, device=device)
        if pp_group is not None and pp_group.size() > 1:
            dist.broadcast(shard, src=dist.get_global_rank(pp_group, owner), group=pp_group)
        yield from mapping.to_hf(_gather(shard, mapping, tp_group), sharding).items()


def _canonical_name(local_name: str, chunk: nn.Module) -> str:
    match = _LAYER_NAME.fullmatch(local_name)
    if match is None:
        return local_name
    decoder: Any = chunk.decoder
    layer_index = decoder.layers[int(match[1])].layer_number - 1
    return f"decoder.layers.{layer_index}.{FUSED_NORM_ALIASES.get(match[2], match[2])}"


def _check_shape(parameter: Tensor, mapping: Mapping, sharding: Sharding) -> None:
    expected = mapping.megatron_shape(sharding)
    assert tuple(parameter.shape) == expected, f"{mapping.megatron_name} is {tuple(parameter.shape)}, not {expected}"


def _agree_on_owners(
    table: Sequence[Mapping],
    parameters: TensorMapping[str, Tensor],
    device: torch.device,
    pp_group: dist.ProcessGroup | None,
) -> list[tuple[int, torch.dtype]]:
    """For each mapping the pipeline rank that holds it, and its dtype there, the same on every rank."""
    codes = torch.tensor(
        [
            1 + _STREAM_DTYPES.index(parameters[row.megatron_name].dtype) if row.megatron_name in parameters else 0
            for row in table
        ],
        device=device,
    )
    stages = [codes]
    if _size(pp_group) > 1:
        stages = [torch.empty_like(codes) for _ in range(_size(pp_group))]
        dist.all_gather(stages, codes, group=pp_group)
    owners = []
    for row, codes_of_row in zip(table, torch.stack(stages, dim=1).tolist(), strict=True):
        holders = [stage for stage, code in enumerate(codes_of_row) if code]
        assert len(holders) == 1, f"{row.megatron_name} is on pipeline stages {holders}, not on exactly one"
        owners.append((holders[0], _STREAM_DTYPES[codes_of_row[holders[0]] - 1]))
    return owners


def _gather(shard: Tensor, mapping: Mapping, tp_group: dist.ProcessGroup | None) -> list[Tensor]:
    """The shards of all tensor-parallel ranks in order; only this one if all are the same."""
    if _size(tp_group) == 1 or mapping.split_dim is None:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(_size(tp_group))]
    dist.all_gather(shards, shard, group=tp_group)
    return shards


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else group.size()
