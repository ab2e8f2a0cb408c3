"""What a tracker was told, in a file of the run directory: a resumed run goes on in the tracker's run and repeats nothing.

Trackers that live elsewhere cannot take back a step. After a crash a run starts again at its newest checkpoint, and the steps
from there to the crash are run again: the tracker keeps what it was told of them first, metrics.jsonl holds the second.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from oprd_megatron.logging.jsonl import write_atomically


class Told:
    """The file.

    Args:
        path: of it.
        resume: read what is there; False begins anew.

    Attributes:
        run_id: the tracker's name for the run; None until `begin`.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        found = json.loads(path.read_text()) if resume and path.exists() else {"run_id": None, "last_steps": {}}
        self.run_id: str | None = found["run_id"]
        self._last_steps: dict[str, int] = found["last_steps"]

    def begin(self, run_id: str) -> None:
        """The tracker has a run of this name."""
        self.run_id = run_id
        self._write()

    def is_news(self, record: dict[str, Any]) -> bool:
        """Whether no record of its kind was told of its step or a later one."""
        return record["step"] > self._last_steps.get(record["kind"], -1)

    def add(self, record: dict[str, Any]) -> None:
        """The tracker has this record."""
        self._last_steps[record["kind"]] = record["step"]
        self._write()

    def _write(self) -> None:
        write_atomically(self.path, json.dumps({"run_id": self.run_id, "last_steps": self._last_steps}))
