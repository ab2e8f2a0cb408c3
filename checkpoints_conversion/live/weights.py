"""Weights of live, sharded models: load them from a Hugging Face directory, or stream them out under its names.

Loading needs no communication: each rank reads its own slices. Streaming is collective over one grid of tensor x expert x
pipeline ranks and never holds more than one parameter in full: the owning stage broadcasts its shard along the pipeline, then
every stage gathers the shards of its tensor-parallel group.

With expert parallelism of size E, expert-parallel rank r holds the experts r*N/E .. (r+1)*N/E - 1 of N and a copy of all else.
An expert's shard travels along its owner's pipeline first and then to the other expert-parallel ranks; it is gathered over
the experts' own tensor-parallel group (mcore's `expt_tp`), which may be of another size than that of the rest.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Mapping as TensorMapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoints_conversion.architecture import Architecture, Sharding
from checkpoints_conversion.families import mappings_for
from checkpoints_conversion.mappings import Columns, Mapping
from checkpoints_conversion.reader import HFReader, check_tensors, read_rows
from checkpoints_conversion.weights import open_weights
from oprd_megatron.errors import WeightSyncError

FUSED_NORM_ALIASES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine's spec fuses a norm into the linear layer after it: name there -> name in the local spec."""

_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT_NAMES = (
    re.compile(r"mlp\.experts\.local_experts\.(?P<index>\d+)\.(?P<rest>.+)"),  # SequentialMLP
    re.compile(r"mlp\.experts\.(?P<rest>linear_fc[12]\.weight)(?P<index>\d+)"),  # TEGroupedMLP
)
"""How mcore names a parameter of one of a rank's experts, which it counts from 0 on every rank."""
_STREAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""A dtype travels between stages as its position here plus one; zero means "not on this stage"."""


@dataclass(frozen=True)
class Store:
    """Where a quantised parameter's values go. `take` is called once, with the shard in `dtype`."""

    dtype: torch.dtype
    take: Callable[[Tensor], Any]


_PARTS = ("embedding", "decoder", "output_layer")
"""Of a GPTModel, that hold parameters."""


def canonical_parameters(model_chunks: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters of this rank's chunks by canonical name: local spec, 0-based global layer and expert indices. What a
    trainer hung on a chunk beside the model's own parts is left out.

    Args:
        model_chunks: unwrapped GPTModels (one, or several with virtual pipeline stages). The layer's index comes from
            `chunk.decoder.layers[i].layer_number`, which mcore counts from 1 over the whole model, an expert's from
            `.mlp.local_expert_indices` of its layer.
    """
    parameters: dict[str, nn.Parameter] = {}
    for chunk in model_chunks:
        for local_name, parameter in chunk.named_parameters():
            if local_name.partition(".")[0] not in _PARTS:
                continue
            name = _canonical_name(local_name, chunk)
            assert name not in parameters, f"two parameters of this rank are {name}"
            parameters[name] = parameter
    return parameters


@torch.no_grad()
def load_hf_weights(
    model_chunks: Sequence[nn.Module],
    hf_dir: str | Path,
    sharding: Sharding,
    arch: Architecture,
    expert_tp_group: dist.ProcessGroup | None = None,
    stores: TensorMapping[nn.Parameter, Store] | None = None,
    after_each: Callable[[], None] | None = None,
) -> None:
    """Fill this rank's parameters from a model on disk, in place, reading only this rank's slices and experts.

    Values are cast to each parameter's dtype. Not collective: ranks may call it at different times.

    Args:
        model_chunks: unwrapped GPTModels of this rank.
        hf_dir: directory with config.json and safetensors, or a Megatron checkpoint (`checkpoints_conversion.weights`).
        sharding: this rank's slice of the model.
        arch: what `check_model(hf_dir)` returned.
        expert_tp_group: tensor-parallel group of the experts; None: they are cut like everything else.
        stores: of parameters that cannot be filled row by row (quantised ones): given the whole shard, which is assembled in
            `Store.dtype` on the parameter's device, one parameter at a time.
        after_each: called after each parameter.

    Raises:
        CheckpointError: the directory is broken or does not hold this architecture.
        LayoutError: the sharding does not fit the architecture.
    """
    sharding.check(arch)
    table = mappings_for(arch)
    with contextlib.closing(open_weights(Path(hf_dir), arch)) as source:
        if isinstance(source, HFReader):
            check_tensors(source, arch, source.hf_dir)
        for name, parameter in canonical_parameters(model_chunks).items():
            assert name in table, f"no mapping for parameter {name} of a {arch.family} model"
            cut = _cut_of(table[name], sharding, expert_tp_group)
            _check_shape(parameter, table[name], cut)
            store = (stores or {}).get(parameter)
            target = (
                parameter if store is None else torch.empty(parameter.shape, dtype=store.dtype, device=parameter.device)
            )
            table[name].load(target, partial(read_rows, source), cut)
            if store is not None:
                store.take(target)
            if after_each is not None:
                after_each()


@torch.no_grad()
def load_hf_tensors(
    model_chunks: Sequence[nn.Module],
    tensors: Iterable[tuple[str, Tensor]],
    sharding: Sharding,
    arch: Architecture,
    expert_tp_group: dist.ProcessGroup | None = None,
) -> None:
    """Fill this rank's parameters, in place, from whole tensors as they come: the way back of `stream_hf_weights`. None is
    held. Not collective.

    Args:
        model_chunks: unwrapped GPTModels of this rank.
        tensors: (hf_name, whole tensor), in the order of the table; each is only used until the next one is asked for.
        sharding, arch, expert_tp_group: as for `load_hf_weights`.

    Raises:
        WeightSyncError: a tensor is missing, unexpected, out of order or of another shape; names it.
        LayoutError: the sharding does not fit the architecture.
    """
    sharding.check(arch)
    stream, parameters = iter(tensors), canonical_parameters(model_chunks)
    table = mappings_for(arch).values()
    users: dict[str, list[Mapping]] = {}
    for row in (row for row in table if row.megatron_name in parameters):
        for name in row.hf_names:
            users.setdefault(name, []).append(row)
    for name, shape in ((name, shape) for row in table if row.exported for name, shape in row.hf_shapes.items()):
        tensor = _take(stream, name, shape)
        for row in users.get(name, ()):
            cut = _cut_of(row, sharding, expert_tp_group)
            _check_shape(parameters[row.megatron_name], row, cut)
            row.load(parameters[row.megatron_name], partial(_rows_of, tensor), cut, only=name)
    unexpected = next(stream, None)
    if unexpected is not None:
        raise WeightSyncError(
            f"{unexpected[0]} came after the last tensor of a {arch.family} model; is it another model?"
        )


def _take(stream: Iterator[tuple[str, Tensor]], name: str, shape: tuple[int, ...]) -> Tensor:
    found, tensor = next(stream, ("the end", None))
    if found != name or tensor is None:
        raise WeightSyncError(f"{name} was to come, and {found} came; send the tensors in the order of the table")
    if tuple(tensor.shape) != shape:
        raise WeightSyncError(f"{name} is {list(tensor.shape)}, not {list(shape)}; is it another model?")
    return tensor


def _rows_of(tensor: Tensor, name: str, row: int, rows: int, columns: Columns) -> Tensor:
    found = tensor[row : row + rows]
    return found if columns is None else found[:, columns[0] : columns[1]]


@torch.no_grad()
def stream_hf_weights(
    model_chunks: Sequence[nn.Module],
    arch: Architecture,
    sharding: Sharding,
    tp_group: dist.ProcessGroup | None,
    pp_group: dist.ProcessGroup | None,
    ep_group: dist.ProcessGroup | None = None,
    expert_tp_group: dist.ProcessGroup | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the model under its Hugging Face name, whole, on every rank, in the order of the table.

    COLLECTIVE: all ranks of the grid must take every item. One broadcast over the pipeline (an expert's: and one over the
    expert-parallel group) and one all-gather over the tensor-parallel group a parameter (no gather for norms and routers),
    plus a small all-gather over each of the first two at the start. A tied output layer is not yielded. Padding of heads and
    vocabulary is stripped.

    Args:
        model_chunks: unwrapped GPTModels of this rank.
        arch: the model.
        sharding: this rank's slice of it.
        tp_group: tensor-parallel group in `tp_rank` order; None for a group of one.
        pp_group: pipeline group; None for a group of one.
        ep_group: expert-parallel group; None for a group of one.
        expert_tp_group: tensor-parallel group of the experts; None: they are cut like everything else.

    Yields:
        (hf_name, tensor) with the parameter's dtype and device. A tensor may share memory with the model or with its
        neighbours: copy it to keep it beyond the next item or the next optimizer step.

    Raises:
        LayoutError: the sharding does not fit the architecture.
    """
    parameters = canonical_parameters(model_chunks)
    yield from stream_hf_tensors(parameters, arch, sharding, tp_group, pp_group, ep_group, expert_tp_group)


@torch.no_grad()
def stream_hf_tensors(
    parameters: TensorMapping[str, Tensor],
    arch: Architecture,
    sharding: Sharding,
    tp_group: dist.ProcessGroup | None,
    pp_group: dist.ProcessGroup | None,
    ep_group: dist.ProcessGroup | None = None,
    expert_tp_group: dist.ProcessGroup | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """`stream_hf_weights` of any tensors shaped like this rank's parameters, such as their gradients.

    Args:
        parameters: by canonical name, all that `canonical_parameters` gives on this rank.
        arch, sharding, tp_group, pp_group, ep_group, expert_tp_group: as for `stream_hf_weights`.
    """
    sharding.check(arch)
    table = [mapping for mapping in mappings_for(arch).values() if mapping.exported]
    device = next(iter(parameters.values())).device
    owners = _agree_on_owners(table, parameters, device, pp_group, ep_group)
    for mapping, owner in zip(table, owners, strict=True):
        cut = _cut_of(mapping, sharding, expert_tp_group)
        if mapping.megatron_name in parameters:
            parameter = parameters[mapping.megatron_name]
            _check_shape(parameter, mapping, cut)
            shard = parameter.detach().contiguous()
        else:
            shard = torch.empty(mapping.megatron_shape(cut), dtype=owner.dtype, device=device)
        _spread(shard, mapping, owner, pp_group, ep_group)
        own_group = expert_tp_group if _is_expert(mapping) and expert_tp_group is not None else tp_group
        yield from mapping.to_hf(_gather(shard, mapping, own_group), cut).items()


def _canonical_name(local_name: str, chunk: nn.Module) -> str:
    match = _LAYER_NAME.fullmatch(local_name)
    if match is None:
        return local_name
    decoder: Any = chunk.decoder
    layer, name = decoder.layers[int(match[1])], FUSED_NORM_ALIASES.get(match[2], match[2])
    for pattern in _EXPERT_NAMES:
        if expert := pattern.fullmatch(name):
            name = f"mlp.experts.local_experts.{layer.mlp.local_expert_indices[int(expert['index'])]}.{expert['rest']}"
            break
    return f"decoder.layers.{layer.layer_number - 1}.{name}"


def _is_expert(mapping: Mapping) -> bool:
    """Whether expert parallelism spreads this parameter; the router is on every rank."""
    return ".mlp.experts." in mapping.megatron_name


def _cut_of(mapping: Mapping, sharding: Sharding, expert_tp_group: dist.ProcessGroup | None) -> Sharding:
    """How this parameter is cut: `sharding`, but an expert by its own tensor-parallel group if it has one."""
    if expert_tp_group is None or not _is_expert(mapping):
        return sharding
    return replace(sharding, tp_rank=expert_tp_group.rank(), tp_size=expert_tp_group.size())


def _check_shape(parameter: Tensor, mapping: Mapping, sharding: Sharding) -> None:
    expected = mapping.megatron_shape(sharding)
    assert tuple(parameter.shape) == expected, f"{mapping.megatron_name} is {tuple(parameter.shape)}, not {expected}"


@dataclass(frozen=True)
class _Owner:
    """Where a parameter is: its stage, for an expert its expert-parallel rank (0 for the rest), and its dtype there."""

    stage: int
    ep_rank: int
    dtype: torch.dtype


def _agree_on_owners(
    table: Sequence[Mapping],
    parameters: TensorMapping[str, Tensor],
    device: torch.device,
    pp_group: dist.ProcessGroup | None,
    ep_group: dist.ProcessGroup | None,
) -> list[_Owner]:
    """Who holds each mapping, the same on every rank: an expert is on one stage of one expert-parallel rank, all else on
    one stage, the same one, of every expert-parallel rank."""
    codes = torch.tensor(
        [
            1 + _STREAM_DTYPES.index(parameters[row.megatron_name].dtype) if row.megatron_name in parameters else 0
            for row in table
        ],
        device=device,
    )
    stages = torch.stack(_all_gather(codes, pp_group))
    grid = torch.stack(_all_gather(stages, ep_group))  # [expert-parallel rank, stage, row]
    owners = []
    for row, places in zip(table, grid.permute(2, 0, 1).tolist(), strict=True):
        held = {(rank, stage): code for rank, codes in enumerate(places) for stage, code in enumerate(codes) if code}
        copies = 1 if _is_expert(row) else _size(ep_group)
        is_agreed = len(held) == copies and len({stage for _, stage in held}) == len(set(held.values())) == 1
        assert is_agreed, (
            f"{row.megatron_name} is on (expert-parallel rank, stage) {sorted(held)}, not {copies} of one stage"
        )
        (ep_rank, stage), code = next(iter(held.items()))
        owners.append(_Owner(stage, ep_rank, _STREAM_DTYPES[code - 1]))
    return owners


def _spread(
    shard: Tensor,
    mapping: Mapping,
    owner: _Owner,
    pp_group: dist.ProcessGroup | None,
    ep_group: dist.ProcessGroup | None,
) -> None:
    """Copy the owner's shard into every rank's: along its pipeline, an expert's from there to the other pipelines."""
    holds_it = not _is_expert(mapping) or ep_group is None or ep_group.rank() == owner.ep_rank
    if pp_group is not None and pp_group.size() > 1 and holds_it:
        dist.broadcast(shard, src=dist.get_global_rank(pp_group, owner.stage), group=pp_group)
    if ep_group is not None and ep_group.size() > 1 and _is_expert(mapping):
        dist.broadcast(shard, src=dist.get_global_rank(ep_group, owner.ep_rank), group=ep_group)


def _gather(shard: Tensor, mapping: Mapping, tp_group: dist.ProcessGroup | None) -> list[Tensor]:
    """The shards of all tensor-parallel ranks in order; only this one if all are the same."""
    if _size(tp_group) == 1 or mapping.split_dim is None:
        return [shard]
    return _all_gather(shard, tp_group)


def _all_gather(tensor: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """The tensors of all ranks of a group, in order."""
    if _size(group) == 1:
        return [tensor]
    found = [torch.empty_like(tensor) for _ in range(_size(group))]
    dist.all_gather(found, tensor, group=group)
    return found


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else group.size()
