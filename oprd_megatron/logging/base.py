"""The logger seam: three verbs, and a composite that passes them on. Only rank 0 builds loggers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Logger(Protocol):
    """Takes records such as `{"kind": "train", "step": 3, "loss": 0.2, "layers": {"student": [1, 2], ..}}`."""

    def log(self, record: dict[str, Any]) -> None:
        """Write one record. Its "kind" is train, eval, benchmark, stopped or summary; its "step" counts finished steps."""

    def truncate_after(self, step: int) -> None:
        """Forget everything after `step`: a resumed run is about to write those steps again. Who cannot forget does not write
        them again (`told.py`)."""

    def close(self) -> None:
        """Flush and release. Nothing is logged afterwards."""


class Loggers:
    """Several loggers as one."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = list(loggers)

    def log(self, record: dict[str, Any]) -> None:
        """See `Logger.log`."""
        for logger in self.loggers:
            logger.log(record)

    def truncate_after(self, step: int) -> None:
        """See `Logger.truncate_after`."""
        for logger in self.loggers:
            logger.truncate_after(step)

    def close(self) -> None:
        """See `Logger.close`."""
        for logger in self.loggers:
            logger.close()
