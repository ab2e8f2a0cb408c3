"""TensorBoard scalars (`scalars.py` names them), written with tensorboard's own event writer (no torch needed)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from oprd_megatron.logging.scalars import scalars


class TensorBoardLogger:
    """Writes event files to a directory."""

    def __init__(self, directory: str | Path) -> None:
        self._writer = EventFileWriter(str(directory))

    def log(self, record: dict[str, Any]) -> None:
        """See `Logger.log`."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(record).items()]
        self._writer.add_event(Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values)))

    def truncate_after(self, step: int) -> None:
        """Write a restart mark: TensorBoard then hides what earlier event files hold from `step` + 1 on."""
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def close(self) -> None:
        """See `Logger.close`."""
        self._writer.close()
