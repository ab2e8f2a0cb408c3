"""Responses of a benchmark on disk, as they come: a start after a kill asks only for what is missing.

`responses.jsonl` has the rows of `oprd rollout` (`recorded_row`), with step 0 and a number for each response; lines are
flushed, and a torn last one is cut off. `settings.json`, made at the first start, says how they were made; other settings are
refused.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from oprd_megatron.errors import ConfigError, DataError
from oprd_megatron.logging import write_atomically
from oprd_megatron.rollout.recorded_row import Recorded, checked_row

RESPONSES_FILE = "responses.jsonl"
SETTINGS_FILE = "settings.json"


class ResponseFile:
    """The responses of one output folder; a context manager, which holds the folder against a second process.

    Args:
        folder: made if it is not there.
        settings: how the responses are made, as json has it.

    Attributes:
        found: {sample index: response} on disk.

    Raises:
        ConfigError: the folder holds responses that were made otherwise.
        DataError: another process works in it, or a line is not a response.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / RESPONSES_FILE
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another process is writing here; wait for it, or give another --out") from None
        self._settle(folder / SETTINGS_FILE, json.loads(json.dumps(settings)))
        self.found = self._read()

    def add(self, rows: Iterable[Recorded]) -> None:
        """Append responses."""
        for row in rows:
            self._file.write(json.dumps(vars(row), allow_nan=False).encode() + b"\n")
            self.found[row.sample_index] = row
        self._file.flush()

    def __enter__(self) -> ResponseFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _settle(self, path: Path, settings: dict[str, Any]) -> None:
        if not path.exists():
            if self._file.seek(0, 2):
                raise ConfigError(f"{self.path}: lies there without {path.name}; give another --out")
            write_atomically(path, json.dumps(settings, indent=1))
            return
        old = json.loads(path.read_text())
        for key in {**old, **settings}:
            if old.get(key) != settings.get(key):
                raise ConfigError(
                    f"{path.parent}: its responses were made with {key} {_short(old.get(key))}, not "
                    f"{_short(settings.get(key))}; give another --out, or the settings in {path.name}"
                )

    def _read(self) -> dict[int, Recorded]:
        found: dict[int, Recorded] = {}
        whole = 0
        self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            place = f"{self.path}:{number}"
            try:
                values = json.loads(line)
            except ValueError:
                values = None
            if not isinstance(values, dict):
                raise DataError(f"{place}: not a response; remove the line, and it is written again")
            row = checked_row(values, place)
            found[row.sample_index] = row
            whole += len(line)
        self._file.truncate(whole)
        return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
