"""What a person sees while a run trains: a bar on a terminal, one plain line a step anywhere else (files, CI)."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm


class ProgressLogger:
    """Shows loss, cosine, tokens per second and the time left after every training step, and each evaluation.

    Args:
        total_steps: Training steps in all, those before a resume included.
        stream: Where to write; left out, standard error.
    """

    def __init__(self, total_steps: int, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._total = total_steps
        self._first = 0
        self._started = time.monotonic()
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(total=total_steps, desc="training", unit="step", file=self._stream, dynamic_ncols=True)

    def log(self, record: dict[str, Any]) -> None:
        """See `Logger.log`."""
        if record["kind"] == "train" and self._bar is not None:
            self._bar.set_postfix_str(_figures(record), refresh=False)
            self._bar.update(record["step"] - self._bar.n)
        elif record["kind"] == "train":
            left = f"{tqdm.format_interval(self._seconds_left(record['step']))} left"
            self._write(f"step {record['step']}/{self._total}  {_figures(record)}  {left}")
        elif record["kind"] == "eval":
            named = (("KL", "kl"), ("cross-entropy", "cross_entropy"), ("cosine", "cosine"))
            figures = [f"{name} {record[key]:.4f}" for name, key in named if record[key] is not None]
            self._write(f"held-out at step {record['step']}: {'  '.join(figures)}")

    def truncate_after(self, step: int) -> None:
        """Start counting at `step`: a resumed run has only the steps after it to do."""
        self._first = step
        self._started = time.monotonic()
        if self._bar is not None:
            self._bar.initial = self._bar.n = step
            self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def _seconds_left(self, step: int) -> float:
        elapsed = time.monotonic() - self._started
        return elapsed / max(step - self._first, 1) * (self._total - step)

    def _write(self, line: str) -> None:
        """One line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()


def _figures(record: dict[str, Any]) -> str:
    return f"loss {record['loss']:.4g}  cosine {record['cosine']:.4f}  {record['tokens_per_second']:,.0f} tok/s"
