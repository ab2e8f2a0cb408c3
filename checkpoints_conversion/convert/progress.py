"""What a person sees while files are converted: bytes, rate and time left on a terminal, one line a phase elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm


class Progress:
    """Counts bytes, in this process or in several."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bar: tqdm[Any] | None = None
        self._shared: Any = None
        self._seen = 0
        self._started = time.monotonic()
        self.bytes = 0
        """Of the current phase."""
        self.memory: dict[int, int] = {}
        """Most bytes that a process that writes held, by process id."""

    def share(self, context: Any) -> Any:
        """A counter that worker processes add to."""
        self._shared = context.Value("q", 0)
        return self._shared

    def phase(self, name: str, total: int) -> None:
        """Begin to count anew, towards `total` bytes; nothing is shown for an empty name."""
        self.close()
        self.bytes, self._started = 0, time.monotonic()
        if not name:
            return
        if self._stream.isatty():
            self._bar = tqdm(
                total=total,
                desc=name,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                file=self._stream,
                dynamic_ncols=True,
            )
        else:
            self._stream.write(f"{name}: {total / 2**30:.2f} GiB\n")
            self._stream.flush()

    def advance(self, nbytes: int) -> None:
        """Count bytes that this process wrote."""
        self.bytes += nbytes
        if self._bar is not None:
            self._bar.update(nbytes)

    def refresh(self) -> None:
        """Count what the worker processes wrote since the last call."""
        if self._shared is not None:
            value = self._shared.value
            self.advance(value - self._seen)
            self._seen = value

    @property
    def seconds(self) -> float:
        """Since the phase began."""
        return time.monotonic() - self._started

    def note(self, line: str) -> None:
        """A line that stays."""
        tqdm.write(line, file=self._stream)

    def close(self) -> None:
        """End the phase."""
        self.refresh()
        if self._bar is not None:
            self._bar.close()
            self._bar = None
