"""The named mappings between Hugging Face tensors and Megatron parameters. No torch is imported here.

A mapping is data: which rows of the Megatron parameter are which rows of which Hugging Face tensor (`Copy`). Everything
else follows from that list: a rank's shard, the tensors put back together, a checkpoint file written or read piece by
piece. Bytes are moved and never computed with, so every conversion there and back is bitwise.

Shapes (Megatron stores linear weights [out, in], as Hugging Face does):
    D hidden width, F feed-forward width, V vocabulary, G query groups, M query heads a group, H head dimension,
    T tensor-parallel size; a trailing p means padded (Vp, Gp). Padding is zero and comes last.

                     Hugging Face              Megatron, whole            split over T ranks
    Replicated       [D], [H], [E, D]          the same                   not
    VocabParallel    [V, D]                    [Vp, D]                    rows
    RowParallel      [D, F]                    [D, F]                     columns
    AttentionOutput  [D, G*M*H]                [D, Gp*M*H]                columns, by query group
    GatedMLP         gate, up [F, D]           [2*F, D]                   rows of gate, and rows of up
    QKV              q [G*M*H, D],             [Gp*(M+2)*H, D]            rows, by query group: its M queries, key, value
                     k and v [G*H, D]

`FusedGatedMLP` and `FusedQKV` are the same parameters where the Hugging Face file holds one tensor: gate over up, q over k
over v.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Self

from checkpoints_conversion.architecture import Sharding

if TYPE_CHECKING:
    from torch import Tensor

Columns = tuple[int, int] | None
"""A range of columns; None for all of them, and for a vector."""
ReadRows = Callable[[str, int, int, Columns], "Tensor"]
"""`read(hf_name, row, rows, columns)`: that rectangle of one Hugging Face tensor, and nothing else."""


@dataclass(frozen=True)
class Copy:
    """`rows` rows of a Megatron parameter that are rows of one Hugging Face tensor."""

    hf_name: str
    hf_row: int
    row: int
    rows: int
    columns: Columns = None
    """Of the Hugging Face tensor; they are the first columns of the parameter (of the shard, for a shard's copies)."""

    def within(self, start: int, stop: int, to: int = 0) -> Copy | None:
        """The part in the parameter's rows `start:stop`, where `start` becomes row `to`; None if there is none."""
        first, last = max(self.row, start), min(self.row + self.rows, stop)
        if first >= last:
            return None
        return replace(self, hf_row=self.hf_row + first - self.row, row=first - start + to, rows=last - first)


@dataclass(frozen=True)
class Part:
    """A rectangle of the whole parameter, as rows of one rank's shard."""

    row_local: int
    row: int
    rows: int
    columns: Columns


@dataclass(frozen=True)
class Mapping(ABC):
    """One Megatron parameter and the Hugging Face tensors it is made of."""

    megatron_name: str
    """Name in mcore's local spec, with a 0-based global layer index (or `{layer}` in a family's table)."""
    hf_names: tuple[str, ...]
    exported: bool = field(default=True, kw_only=True)
    """False for a copy that the Hugging Face file does not hold: the last stage's tied output layer."""

    split_dim: ClassVar[int | None] = None
    """Dimension that tensor parallelism splits; None: every rank holds the whole."""
    num_stacked: ClassVar[int] = 1
    """Matrices stacked by rows, each of which is split: a rank holds its rows of the first, then its rows of the next."""

    @property
    @abstractmethod
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Unsharded shape of every Hugging Face tensor, by name."""

    @abstractmethod
    def shape(self, sharding: Sharding) -> tuple[int, ...]:
        """Shape of the whole parameter, padded as the sharding says."""

    @abstractmethod
    def copies(self, sharding: Sharding) -> list[Copy]:
        """What the whole parameter is made of, by rising rows; rows and columns that no copy names are padding, zero."""

    def megatron_shape(self, sharding: Sharding) -> tuple[int, ...]:
        """Shape of one rank's shard."""
        shape = list(self.shape(sharding))
        if self.split_dim is not None:
            shape[self.split_dim] //= sharding.tp_size
        return tuple(shape)

    def parts(self, sharding: Sharding) -> list[Part]:
        """Where the rank's shard lies in the whole parameter, by rising local rows."""
        shape, size, rank = self.shape(sharding), sharding.tp_size, sharding.tp_rank
        if self.split_dim is None:
            return [Part(0, 0, shape[0], None)]
        if self.split_dim == 1:
            width = shape[1] // size
            return [Part(0, 0, shape[0], (rank * width, (rank + 1) * width))]
        stacked = shape[0] // self.num_stacked
        rows = stacked // size
        return [Part(i * rows, i * stacked + rank * rows, rows, None) for i in range(self.num_stacked)]

    def shard_copies(self, sharding: Sharding) -> list[Copy]:
        """What the rank's shard is made of: `copies`, cut to the rank's rectangle."""
        return list(self._shard_copies(sharding))

    def _shard_copies(self, sharding: Sharding) -> Iterator[Copy]:
        whole = self.copies(sharding)
        for part in self.parts(sharding):
            for copy in whole:
                inside = copy.within(part.row, part.row + part.rows, to=part.row_local)
                if inside is None:
                    continue
                if part.columns is not None:
                    start, stop = part.columns
                    real = self.hf_shapes[copy.hf_name][1]
                    if start >= real:
                        continue
                    inside = replace(inside, columns=(start, min(stop, real)))
                yield inside

    def load(self, parameter: Tensor, read: ReadRows, sharding: Sharding, only: str | None = None) -> None:
        """Fill a rank's shard [`megatron_shape`] in place, in its own dtype, reading only what it holds.

        Args:
            only: fill what comes from this Hugging Face tensor; padding is filled with the first one.
        """
        copies = self.shard_copies(sharding)
        filled = sum(copy.rows * _width(copy, parameter) for copy in copies)
        if filled < parameter.numel() and only in (None, self.hf_names[0]):
            parameter.zero_()
        for copy in copies:
            if only in (None, copy.hf_name):
                _rectangle(parameter, copy).copy_(read(copy.hf_name, copy.hf_row, copy.rows, copy.columns))

    def to_hf(self, shards: Sequence[Tensor], sharding: Sharding) -> dict[str, Tensor]:
        """The full Hugging Face tensors, padding stripped; they may share memory with `shards`.

        Args:
            shards: the parameter of every tensor-parallel rank in rank order (just one if it is not split).
            sharding: any rank's sharding of the same layout.
        """
        if len(shards) == 1:
            sharding = replace(sharding, tp_rank=0, tp_size=1)
        found: dict[str, Tensor] = {}
        for rank, shard in enumerate(shards):
            for copy in self.shard_copies(replace(sharding, tp_rank=rank)):
                source, shape = _rectangle(shard, copy), self.hf_shapes[copy.hf_name]
                if tuple(source.shape) == shape:
                    found[copy.hf_name] = source.contiguous()
                    continue
                target = found.setdefault(copy.hf_name, shard.new_empty(shape))
                rows = target[copy.hf_row : copy.hf_row + copy.rows]
                (rows if copy.columns is None else rows[:, slice(*copy.columns)]).copy_(source)
        return {name: found[name] for name in self.hf_names}

    def for_layer(self, layer_index: int) -> Self:
        """The same mapping with `{layer}` filled in (0-based global index)."""
        return replace(
            self,
            megatron_name=self.megatron_name.format(layer=layer_index),
            hf_names=tuple(name.format(layer=layer_index) for name in self.hf_names),
        )


@dataclass(frozen=True)
class Replicated(Mapping):
    """A tensor that every rank holds whole: norm weights, routers."""

    size: int | tuple[int, int]

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.hf_names[0]: (self.size,) if isinstance(self.size, int) else self.size}

    def shape(self, sharding: Sharding) -> tuple[int, ...]:
        return self.hf_shapes[self.hf_names[0]]

    def copies(self, sharding: Sharding) -> list[Copy]:
        return [Copy(self.hf_names[0], 0, 0, self.shape(sharding)[0])]


@dataclass(frozen=True)
class _Matrix(Mapping):
    """One matrix, padded along `split_dim`."""

    hf_shape: tuple[int, int]

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.hf_names[0]: self.hf_shape}

    def shape(self, sharding: Sharding) -> tuple[int, ...]:
        return self.hf_shape

    def copies(self, sharding: Sharding) -> list[Copy]:
        return [Copy(self.hf_names[0], 0, 0, self.hf_shape[0], (0, self.hf_shape[1]))]


@dataclass(frozen=True)
class RowParallel(_Matrix):
    """A linear layer whose input is sharded: `mlp.linear_fc2`."""

    split_dim: ClassVar[int | None] = 1


@dataclass(frozen=True)
class VocabParallel(_Matrix):
    """Embedding or output layer: rows padded to `vocab_size_padded`."""

    split_dim: ClassVar[int | None] = 0

    def shape(self, sharding: Sharding) -> tuple[int, ...]:
        return (sharding.vocab_size_padded, self.hf_shape[1])


@dataclass(frozen=True)
class AttentionOutput(_Matrix):
    """`self_attention.linear_proj`: row-parallel over heads, columns padded by whole query groups."""

    group_width: int
    """Columns of one query group: M * H."""

    split_dim: ClassVar[int | None] = 1

    def shape(self, sharding: Sharding) -> tuple[int, ...]:
        return (self.hf_shape[0], sharding.num_query_groups_padded * self.group_width)


@dataclass(frozen=True)
class GatedMLP(Mapping):
    """`mlp.linear_fc1`: mcore chunks each rank's output in two, act(first) * second; `hf_names` is (gate, up)."""

    hf_shape: tuple[int, int]
    """[F, D] of gate and of up."""

    split_dim: ClassVar[int | None] = 0
    num_stacked: ClassVar[int] = 2

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(self.hf_names, self.hf_shape)

    def shape(self, sharding: Sharding) -> tuple[int, ...]:
        return (2 * self.hf_shape[0], self.hf_shape[1])

    def copies(self, sharding: Sharding) -> list[Copy]:
        size = self.hf_shape[0]
        return [Copy(name, 0, i * size, size) for i, name in enumerate(self.hf_names)]


@dataclass(frozen=True)
class FusedGatedMLP(GatedMLP):
    """`mlp.linear_fc1` from one tensor [2*F, D], gate over up (Phi-3)."""

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.hf_names[0]: (2 * self.hf_shape[0], self.hf_shape[1])}

    def copies(self, sharding: Sharding) -> list[Copy]:
        return [Copy(self.hf_names[0], 0, 0, 2 * self.hf_shape[0])]


@dataclass(frozen=True)
class QKV(Mapping):
    """`self_attention.linear_qkv`, weight or bias; `hf_names` is (q, k, v)."""

    num_query_groups: int
    heads_per_group: int
    head_dim: int
    columns: int | None
    """Input width D of the weight; None for the bias."""

    split_dim: ClassVar[int | None] = 0

    @property
    def group_rows(self) -> tuple[int, int, int]:
        """Rows that one query group has in q, k and v."""
        return (self.heads_per_group * self.head_dim, self.head_dim, self.head_dim)

    @property
    def sources(self) -> tuple[tuple[str, int], ...]:
        """(tensor, its first row) of q, k and v."""
        return tuple((name, 0) for name in self.hf_names)

    @property
    def _trailing(self) -> tuple[int, ...]:
        return () if self.columns is None else (self.columns,)

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        rows = (self.num_query_groups * rows for rows in self.group_rows)
        return {name: (size, *self._trailing) for name, size in zip(self.hf_names, rows, strict=True)}

    def shape(self, sharding: Sharding) -> tuple[int, ...]:
        return (sharding.num_query_groups_padded * sum(self.group_rows), *self._trailing)

    def copies(self, sharding: Sharding) -> list[Copy]:
        found, row = [], 0
        for group in range(self.num_query_groups):
            for (name, first), rows in zip(self.sources, self.group_rows, strict=True):
                found.append(Copy(name, first + group * rows, row, rows))
                row += rows
        return found


@dataclass(frozen=True)
class FusedQKV(QKV):
    """`self_attention.linear_qkv` from one tensor [G*(M+2)*H, D]: all queries over all keys over all values (Phi-3)."""

    @property
    def sources(self) -> tuple[tuple[str, int], ...]:
        queries, keys, _ = (self.num_query_groups * rows for rows in self.group_rows)
        return tuple((self.hf_names[0], first) for first in (0, queries, queries + keys))

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.hf_names[0]: (self.num_query_groups * sum(self.group_rows), *self._trailing)}


def _width(copy: Copy, parameter: Tensor) -> int:
    """Numbers in one row of a copy."""
    if copy.columns is not None:
        return copy.columns[1] - copy.columns[0]
    return parameter.numel() // parameter.shape[0]


def _rectangle(parameter: Tensor, copy: Copy) -> Tensor:
    """The part of a shard that a copy fills."""
    rows = parameter[copy.row : copy.row + copy.rows]
    return rows if copy.columns is None else rows[:, : _width(copy, parameter)]
