"""Seconds and peak memory of one step, phase by phase.

On CPU, torch's profiler tells of every allocation and release: in forward, in backward and inside kernels. Adding them up in
the order of time gives what was live at each moment, and the peak within each phase. The peak resident set of the process,
which Linux keeps and lets us reset, stands beside it as a check from outside. On a GPU the allocator itself knows its peak.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from oprd_megatron.platform import Platform


@dataclass
class Meter:
    """Seconds and peak bytes of each phase of one arm's step, above what was live when the meter was opened.

    There are two phases, teacher and update. What the teacher's phase does not cover, the exchange too, is the update.

    Attributes:
        seconds, cpu_seconds: {phase: ..}, of the clock and of this process's threads; the latter only where it computes.
        peak, rss: {phase: ..}; rss, the rise of the process's peak resident set, only on Linux CPUs.
        left: bytes still alive when it was closed.
    """

    platform: Platform
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    cpu_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    peak: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    rss: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    left: int = 0

    def __enter__(self) -> Meter:
        gc.collect()
        self.platform.synchronize()
        self.has_rss = sys.platform == "linux" and not self.platform.is_cuda
        if self.platform.is_cuda:
            torch.cuda.empty_cache()
            self.before = torch.cuda.memory_allocated()
            return self
        if self.has_rss:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            self.before = _proc_status("VmRSS")
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.platform.is_cuda:
            self.left = torch.cuda.memory_allocated() - self.before
        else:
            self.profile.stop()
            self._read_profile()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        name = "teacher" if name == "teacher" else "update"
        if self.platform.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        elif self.has_rss:
            Path("/proc/self/clear_refs").write_text("5")
        with record_function(f"phase {name}"):
            start, cpu_start = time.perf_counter(), time.process_time()
            yield
            self.platform.synchronize()
            self.seconds[name] += time.perf_counter() - start
            self.cpu_seconds[name] += time.process_time() - cpu_start
        if self.platform.is_cuda:
            self.peak[name] = max(self.peak[name], torch.cuda.max_memory_allocated() - self.before)
        elif self.has_rss:
            self.rss[name] = max(self.rss[name], _proc_status("VmHWM") - self.before)

    def _read_profile(self) -> None:
        """Add up the allocator's events. A phase is the span of its `record_function`."""
        events = sorted(self.profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())  # type: ignore[union-attr]
        spans = [
            (event.start_ns(), event.start_ns() + event.duration_ns(), event.name().removeprefix("phase "))
            for event in events
            if event.name().startswith("phase ")
        ]
        live, seen = 0, 0
        for event in events:
            if event.name() != "[memory]":
                continue
            now, held = event.start_ns(), live  # what was live until now counts for every span that began since
            live += event.nbytes()
            while seen < len(spans) and spans[seen][1] < now:
                self.peak[spans[seen][2]] = max(self.peak[spans[seen][2]], held)
                seen += 1
            if seen < len(spans) and spans[seen][0] <= now:
                self.peak[spans[seen][2]] = max(self.peak[spans[seen][2]], held, live)
        self.left = live


def _proc_status(name: str) -> int:
    """A size that /proc/self/status has in KiB, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
