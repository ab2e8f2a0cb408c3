"""The one or several files of a GGUF model as one: `name.gguf`, or `name-00001-of-00003.gguf` and so on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_conversion.files.messages import quoted, shown
from checkpoints_conversion.formats.gguf_file import GGUFFile, GGUFTensor
from oprd_megatron.errors import CheckpointError

SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
MAX_FILES = 1000


class GGUFModel:
    """All tensors by GGUF name; the settings are the first file's."""

    def __init__(self, path: Path) -> None:
        """Open a model by any of its files.

        Raises:
            CheckpointError: a file is missing or damaged, or the files are not of one model.
        """
        self._opened: list[GGUFFile] = []
        self._file_of: dict[str, GGUFFile] = {}
        try:
            for each in split_files(path):
                self._add(GGUFFile(each))
            self._check_split()
        except BaseException:
            self.close()
            raise
        self.path = self._opened[0].path
        self.settings: dict[str, Any] = self._opened[0].settings

    def _add(self, file: GGUFFile) -> None:
        self._opened.append(file)
        for name in file.tensors:
            if name in self._file_of:
                other = self._file_of[name].path.name
                raise CheckpointError(f"{file.path}: {shown(name)} is in {other} as well; download both again")
            self._file_of[name] = file

    def _check_split(self) -> None:
        for number, file in enumerate(self._opened):
            place = (file.settings.get("split.no", 0), file.settings.get("split.count", 0) or 1)
            if place != (number, len(self._opened)):
                raise CheckpointError(
                    f"{file.path}: says it is file {quoted(place[0])} of {quoted(place[1])}, counted from 0; its name says "
                    f"{number} of {len(self._opened)}; give every file the name it was published with"
                )

    @property
    def files(self) -> list[Path]:
        return [file.path for file in self._opened]

    @property
    def tensors(self) -> dict[str, GGUFTensor]:
        return {name: file.tensors[name] for name, file in self._file_of.items()}

    def file_of(self, name: str) -> Path:
        return self._file_of[name].path

    def rows(self, name: str, row: int, rows: int) -> Iterator[np.ndarray]:
        """See `GGUFFile.rows`."""
        return self._file_of[name].rows(name, row, rows)

    def close(self) -> None:
        """Let go of the files."""
        for file in self._opened:
            file.close()


def split_files(path: Path) -> list[Path]:
    """The files of the model that a file belongs to, in order.

    Raises:
        CheckpointError: one of them is missing.
    """
    match = SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if not 0 < count <= MAX_FILES:
        raise CheckpointError(f"{path}: its name says {count} files; no model has so many")
    files = [path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    absent = [file for file in files if not file.is_file()]
    if absent:
        raise CheckpointError(f"{absent[0]}: missing ({len(absent)} of {count} files are); finish the download")
    return files
