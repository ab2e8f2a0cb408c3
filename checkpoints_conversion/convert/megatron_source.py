"""A Megatron checkpoint (torch_dist, any layout) seen as the Hugging Face tensors that it holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from checkpoints_conversion.architecture import Architecture, Sharding
from checkpoints_conversion.convert.stored_names import stored_place
from checkpoints_conversion.families import mappings_for
from checkpoints_conversion.files.dtypes import ITEMSIZE
from checkpoints_conversion.files.source import TensorSource
from checkpoints_conversion.mappings import QKV, AttentionOutput, Copy, Mapping, VocabParallel
from checkpoints_conversion.torch_dist import TorchDistReader
from oprd_megatron.errors import CheckpointError


class _Stored:
    """One parameter in the files: where it is, and which of its rows are which rows of its Hugging Face tensors."""

    def __init__(self, mapping: Mapping, key: str, leading: tuple[int, ...], sharding: Sharding) -> None:
        self.key, self.leading = key, leading
        self._copies: dict[str, list[Copy]] = {}
        for copy in sorted(mapping.copies(sharding), key=lambda copy: copy.hf_row):
            self._copies.setdefault(copy.hf_name, []).append(copy)

    def runs(self, hf_name: str, row: int, rows: int) -> Iterator[tuple[int, int, int]]:
        """(first row there, first row of the parameter, rows) for rows `row:row + rows` of a Hugging Face tensor."""
        for copy in self._copies[hf_name]:
            first, last = max(copy.hf_row, row), min(copy.hf_row + copy.rows, row + rows)
            if first < last:
                yield first, copy.row + first - copy.hf_row, last - first


class MegatronSource(TensorSource):
    """The tensors of a Megatron checkpoint under their Hugging Face names, read row by row."""

    def __init__(self, directory: Path, arch: Architecture) -> None:
        """Open a torch_dist directory and find every tensor of the model in it.

        Raises:
            CheckpointError: it is torn, a tensor is missing, or its shape is not the architecture's.
        """
        self.directory = directory
        self._reader = TorchDistReader(directory)
        self._shapes = {key: tensor.shape for key, tensor in self._reader.tensors.items()}
        self._stored: dict[str, _Stored] = {}
        self._hf_shapes: dict[str, tuple[int, ...]] = {}
        num_experts = arch.experts.num_experts if arch.experts else None
        for mapping in mappings_for(arch).values():
            if not mapping.exported:
                continue
            try:
                place = stored_place(self._shapes, mapping.megatron_name, arch.num_layers, num_experts)
            except CheckpointError as error:
                raise CheckpointError(f"{directory}: {error}") from None
            shape = self._shapes[place.key][len(place.leading) :]
            sharding = _sharding_of(mapping, shape, arch)
            if mapping.shape(sharding) != shape:
                raise CheckpointError(
                    f"{directory}: {mapping.megatron_name} is {list(shape)}, but config.json implies "
                    f"{list(mapping.shape(sharding))}; give the config.json that belongs to it"
                )
            stored = _Stored(mapping, place.key, place.leading, sharding)
            self._hf_shapes.update(mapping.hf_shapes)
            self._stored.update(dict.fromkeys(mapping.hf_names, stored))

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors, a tied output layer excepted."""
        return frozenset(self._stored)

    @property
    def foreign_keys(self) -> list[str]:
        """Stored tensors that are not the model's: optimizer states, or something this project does not know."""
        return sorted(self._shapes.keys() - {stored.key for stored in self._stored.values()})

    @property
    def files(self) -> list[Path]:
        """All files that hold tensors."""
        return sorted(self.directory.glob("*.distcp"))

    def file_of(self, name: str) -> Path:
        """The directory: a tensor may lie in several files."""
        return self.directory

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorSource`; so for the others."""
        return self._hf_shapes[name]

    def dtype(self, name: str) -> str:
        return self._reader.tensors[self._stored[name].key].dtype

    def read_into(self, name: str, row: int, rows: int, columns: tuple[int, int] | None, out: memoryview) -> None:
        stored, shape = self._stored[name], self._hf_shapes[name]
        first_column, last_column = columns or (0, shape[1] if len(shape) > 1 else 1)
        width = (last_column - first_column) * ITEMSIZE[self.dtype(name)]
        for first, stored_row, count in stored.runs(name, row, rows):
            offsets: tuple[int, ...] = (*stored.leading, stored_row)
            sizes: tuple[int, ...] = (*(1 for _ in stored.leading), count)
            if len(shape) > 1:
                offsets, sizes = (*offsets, first_column), (*sizes, last_column - first_column)
            start = (first - row) * width
            self._reader.read_into(stored.key, offsets, sizes, out[start : start + count * width])

    def close(self) -> None:
        self._reader.close()


def _sharding_of(mapping: Mapping, shape: tuple[int, ...], arch: Architecture) -> Sharding:
    """The padding that a stored parameter has: heads and vocabulary may be padded for the layout that wrote it."""
    groups, vocab = arch.num_query_groups, arch.vocab_size
    rows_and_columns = (*shape, 0)
    if isinstance(mapping, VocabParallel):
        vocab = max(vocab, rows_and_columns[0])
    elif isinstance(mapping, QKV):
        groups = max(groups, rows_and_columns[0] // sum(mapping.group_rows))
    elif isinstance(mapping, AttentionOutput):
        groups = max(groups, rows_and_columns[1] // mapping.group_width)
    return Sharding(0, 1, groups, vocab)
