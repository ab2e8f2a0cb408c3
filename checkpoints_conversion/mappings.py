"""The named mappings between Hugging Face tensors and one rank's Megatron parameter.

Each mapping has two verbs. `to_megatron` reads from the file only what this rank holds; `to_hf` puts the shards of all
tensor-parallel ranks back together. Both are exact: no arithmetic touches a weight, so a round trip is bitwise.

Shapes (Megatron stores linear weights [out, in], as Hugging Face does):
    D hidden width, F feed-forward width, V vocabulary, G query groups, M query heads a group, H head dimension,
    T tensor-parallel size; a trailing p means padded (Vp, Gp).

    Replicated       [D] or [H]                                            the same on every rank
    VocabParallel    hf [V, D]                 -> local [Vp/T, D]          rows, zero rows last
    RowParallel      hf [D, F]                 -> local [D, F/T]           columns
    AttentionOutput  hf [D, G*M*H]             -> local [D, Gp/T*M*H]      columns by query group, zero groups last
    GatedMLP         hf gate, up [F, D]        -> local [2*F/T, D]         this rank's gate rows, then its up rows
    QKV              hf q [G*M*H, D]           -> local [Gp/T*(M+2)*H, D]  group by group: its M queries, key, value;
                     and k, v [G*H, D]                                     zero groups last
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from checkpoints_conversion.architecture import Sharding

ReadSlice = Callable[[str, int, int, int], Tensor]
"""`read(hf_name, dim, start, stop)`: rows (dim 0) or columns (dim 1) `start:stop` of one tensor, and nothing else."""


@dataclass(frozen=True)
class Mapping(ABC):
    """One Megatron parameter and the Hugging Face tensors it is made of."""

    megatron_name: str
    """Name in mcore's local spec, with a 0-based global layer index (or `{layer}` in a family's table)."""
    hf_names: tuple[str, ...]
    exported: bool = field(default=True, kw_only=True)
    """False for a copy that the Hugging Face file does not hold: the last stage's tied output layer."""

    tp_sharded: ClassVar[bool] = True
    """Whether the ranks of a tensor-parallel group hold different slices."""

    @property
    @abstractmethod
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Unsharded shape of every Hugging Face tensor, by name."""

    @abstractmethod
    def megatron_shape(self, sharding: Sharding) -> tuple[int, ...]:
        """Shape of the local parameter."""

    @abstractmethod
    def to_megatron(self, read: ReadSlice, sharding: Sharding) -> Tensor:
        """This rank's parameter, `megatron_shape(sharding)`, in the file's dtype."""

    @abstractmethod
    def to_hf(self, shards: Sequence[Tensor], sharding: Sharding) -> dict[str, Tensor]:
        """The full Hugging Face tensors, padding stripped; they may share memory with `shards`.

        Args:
            shards: the parameter of every tensor-parallel rank in rank order (just one if not `tp_sharded`).
            sharding: any rank's sharding of the same layout.
        """

    def for_layer(self, layer_index: int) -> Self:
        """The same mapping with `{layer}` filled in (0-based global index)."""
        return replace(
            self,
            megatron_name=self.megatron_name.format(layer=layer_index),
            hf_names=tuple(name.format(layer=layer_index) for name in self.hf_names),
        )


@dataclass(frozen=True)
class Replicated(Mapping):
    """A vector that every rank holds whole: norm weights."""

    size: int

    tp_sharded: ClassVar[bool] = False

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.hf_names[0]: (self.size,)}

    def megatron_shape(self, sharding: Sharding) -> tuple[int, ...]:
        return (self.size,)

    def to_megatron(self, read: ReadSlice, sharding: Sharding) -> Tensor:
        return read(self.hf_names[0], 0, 0, self.size)

    def to_hf(self, shards: Sequence[Tensor], sharding: Sharding) -> dict[str, Tensor]:
        return {self.hf_names[0]: shards[0]}


@dataclass(frozen=True)
class _Split(Mapping):
    """One matrix cut evenly along one dimension, after padding that dimension with zeros at its end."""

    shape: tuple[int, int]

    split_dim: ClassVar[int]

    def padded_size(self, sharding: Sharding) -> int:
        """Size of `split_dim` over all ranks in Megatron."""
        return self.shape[self.split_dim]

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.hf_names[0]: self.shape}

    def megatron_shape(self, sharding: Sharding) -> tuple[int, ...]:
        local = list(self.shape)
        local[self.split_dim] = self.padded_size(sharding) // sharding.tp_size
        return tuple(local)

    def to_megatron(self, read: ReadSlice, sharding: Sharding) -> Tensor:
        size = self.shape[self.split_dim]
        size_local = self.megatron_shape(sharding)[self.split_dim]
        start, stop = _real_range(sharding.tp_rank, size_local, size)
        return _pad_with_zeros(read(self.hf_names[0], self.split_dim, start, stop), self.split_dim, size_local)

    def to_hf(self, shards: Sequence[Tensor], sharding: Sharding) -> dict[str, Tensor]:
        full = torch.cat(list(shards), dim=self.split_dim)
        return {self.hf_names[0]: full.narrow(self.split_dim, 0, self.shape[self.split_dim]).contiguous()}


@dataclass(frozen=True)
class RowParallel(_Split):
    """A linear layer whose input is sharded: `mlp.linear_fc2`."""

    split_dim: ClassVar[int] = 1


@dataclass(frozen=True)
class VocabParallel(_Split):
    """Embedding or output layer: rows padded to `vocab_size_padded`."""

    split_dim: ClassVar[int] = 0

    def padded_size(self, sharding: Sharding) -> int:
        return sharding.vocab_size_padded


@dataclass(frozen=True)
class AttentionOutput(_Split):
    """`self_attention.linear_proj`: row-parallel over heads, columns padded by whole query groups."""

    group_width: int
    """Columns of one query group: M * H."""

    split_dim: ClassVar[int] = 1

    def padded_size(self, sharding: Sharding) -> int:
        return sharding.num_query_groups_padded * self.group_width


@dataclass(frozen=True)
class GatedMLP(Mapping):
    """`mlp.linear_fc1`: mcore chunks each rank's output in two, silu(first) * second; `hf_names` is (gate, up)."""

    shape: tuple[int, int]
    """[F, D] of gate and of up."""

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(self.hf_names, self.shape)

    def megatron_shape(self, sharding: Sharding) -> tuple[int, ...]:
        return (2 * (self.shape[0] // sharding.tp_size), self.shape[1])

    def to_megatron(self, read: ReadSlice, sharding: Sharding) -> Tensor:
        size_local = self.shape[0] // sharding.tp_size
        start = sharding.tp_rank * size_local
        return torch.cat([read(name, 0, start, start + size_local) for name in self.hf_names])

    def to_hf(self, shards: Sequence[Tensor], sharding: Sharding) -> dict[str, Tensor]:
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return {self.hf_names[0]: torch.cat(gates), self.hf_names[1]: torch.cat(ups)}


@dataclass(frozen=True)
class QKV(Mapping):
    """`self_attention.linear_qkv`, weight or bias; `hf_names` is (q, k, v).

    mcore views the output as [Gp/T, (M + 2) * H]: within a query group its M query heads, then its key, then its value.
    """

    num_query_groups: int
    heads_per_group: int
    head_dim: int
    columns: int | None
    """Input width D of the weight; None for the bias."""

    @property
    def _group_rows(self) -> tuple[int, int, int]:
        """Rows that one query group has in q, k and v."""
        return (self.heads_per_group * self.head_dim, self.head_dim, self.head_dim)

    @property
    def _trailing(self) -> tuple[int, ...]:
        return () if self.columns is None else (self.columns,)

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: (self.num_query_groups * rows, *self._trailing)
            for name, rows in zip(self.hf_names, self._group_rows, strict=True)
        }

    def megatron_shape(self, sharding: Sharding) -> tuple[int, ...]:
        num_groups_local = sharding.num_query_groups_padded // sharding.tp_size
        return (num_groups_local * sum(self._group_rows), *self._trailing)

    def to_megatron(self, read: ReadSlice, sharding: Sharding) -> Tensor:
        num_groups_local = sharding.num_query_groups_padded // sharding.tp_size
        start, stop = _real_range(sharding.tp_rank, num_groups_local, self.num_query_groups)
        parts = [
            read(name, 0, start * rows, stop * rows).reshape(stop - start, rows, *self._trailing)
            for name, rows in zip(self.hf_names, self._group_rows, strict=True)
        ]
        groups = _pad_with_zeros(torch.cat(parts, dim=1), 0, num_groups_local)
        return groups.reshape(self.megatron_shape(sharding))

    def to_hf(self, shards: Sequence[Tensor], sharding: Sharding) -> dict[str, Tensor]:
        groups = torch.cat(list(shards)).reshape(-1, sum(self._group_rows), *self._trailing)[: self.num_query_groups]
        parts = groups.split(self._group_rows, dim=1)
        return {name: part.reshape(self.hf_shapes[name]) for name, part in zip(self.hf_names, parts, strict=True)}


def _real_range(tp_rank: int, size_local: int, size: int) -> tuple[int, int]:
    """The part of this rank's range `[rank * size_local, (rank + 1) * size_local)` that is not padding."""
    start = min(tp_rank * size_local, size)
    return start, min((tp_rank + 1) * size_local, size)


def _pad_with_zeros(tensor: Tensor, dim: int, size: int) -> Tensor:
    """`tensor` with zeros appended along `dim` up to `size`; the tensor itself if it is full already."""
    missing = size - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)
