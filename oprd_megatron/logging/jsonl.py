"""metrics.jsonl: one strict JSON object a line, flushed line by line.

A crash can tear only the last line; readers and a resumed run drop it. Numbers that JSON has no word for (NaN,
infinities) become null, so that any JSON reader can open the file.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from oprd_megatron.errors import UserError

METRICS_FILE = "metrics.jsonl"
"""Name of the metrics in a run directory."""


class JsonlLogger:
    """Appends records to a file.

    Args:
        path: The file; its directory is made. A torn last line of an earlier process is dropped.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            _write_records(self.path, read_records(self.path))
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, record: dict[str, Any]) -> None:
        """See `Logger.log`."""
        self._file.write(_to_line(record))
        self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Drop records with a step above `step`; the file is replaced as a whole, never half-written."""
        self._file.close()
        _write_records(self.path, [record for record in read_records(self.path) if record["step"] <= step])
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """See `Logger.close`."""
        self._file.close()


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """All whole records of a metrics file, in order; a torn last line is left out.

    Raises:
        UserError: the file cannot be read, or a line other than the last is not a record.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot read the metrics ({error.strerror}); give the directory of a run") from None
    last = len(lines) if lines[-1] else len(lines) - 1
    records = []
    for number, line in enumerate(lines[:last], start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif number < last:
            raise UserError(f"{path}:{number}: not a metrics record; remove or mend that line")
    return records


def write_atomically(path: str | Path, text: str) -> None:
    """Replace a file as a whole: readers see the old text or the new one, also after a crash."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _write_records(path: Path, records: list[dict[str, Any]]) -> None:
    write_atomically(path, "".join(map(_to_line, records)))


def _to_line(record: dict[str, Any]) -> str:
    return json.dumps(_finite(record), allow_nan=False, ensure_ascii=False, separators=(",", ":")) + "\n"


def _finite(value: Any) -> Any:
    """The same value with None for every float that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
