"""What a model's weights are read from, whatever the format: names, shapes, dtypes, and rows on demand."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class TensorSource(Protocol):
    """Tensors under their Hugging Face names."""

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""

    @property
    def files(self) -> list[Path]:
        """All files that hold tensors."""

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor, for messages."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""

    def dtype(self, name: str) -> str:
        """Dtype of a tensor in safetensors' spelling ("BF16")."""

    def read_into(self, name: str, row: int, rows: int, columns: tuple[int, int] | None, out: memoryview) -> None:
        """Rows `row:row + rows` of a tensor (elements of a vector), or some of their columns, into `out`: bytes,
        row-major, exactly as many as these have."""

    def close(self) -> None:
        """Let go of the files."""
