"""TensorBoard scalars, written with tensorboard's own event writer (no torch needed).

A record's numbers become tags under its kind: `train/loss`, `train/seconds/rollout`, `eval/kl`. Its per-layer lists
become one scalar a layer, named by the student's layer: `train/cosine/layer_03`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class TensorBoardLogger:
    """Writes event files to a directory."""

    def __init__(self, directory: str | Path) -> None:
        self._writer = EventFileWriter(str(directory))

    def log(self, record: dict[str, Any]) -> None:
        """See `Logger.log`."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in _scalars(record)]
        self._writer.add_event(Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values)))

    def truncate_after(self, step: int) -> None:
        """Write a restart mark: TensorBoard then hides what earlier event files hold from `step` + 1 on."""
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def close(self) -> None:
        """See `Logger.close`."""
        self._writer.close()


def _scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    kind = record["kind"]
    rest = {key: value for key, value in record.items() if key not in ("kind", "step", "layers")}
    yield from _numbers(kind, rest)
    yield from _layers(kind, record.get("layers", {}))
    for teacher, of_teacher in record.get("teachers", {}).items():
        yield from _layers(f"{kind}/teachers/{teacher}", of_teacher.get("layers", {}))


def _layers(prefix: str, layers: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, values in layers.items():
        if name not in ("student", "teacher"):
            for student_layer, value in zip(layers["student"], values, strict=True):
                yield f"{prefix}/{name}/layer_{student_layer:02d}", float(value)


def _numbers(prefix: str, node: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _numbers(f"{prefix}/{key}", value)
        elif isinstance(value, (int, float)):
            yield f"{prefix}/{key}", float(value)
