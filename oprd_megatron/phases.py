"""Where a step's time goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from oprd_megatron.parallel.activity import here
from oprd_megatron.platform import Platform

T = TypeVar("T")


@dataclass
class Phases:
    """Seconds spent in each phase of a step, on this rank; of these, `own` are those in which it did not wait for others."""

    platform: Platform
    seconds: dict[str, float] = field(default_factory=dict)
    own: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start, waited = time.perf_counter(), here.waited
        with here.phase(name):
            yield
            self.platform.synchronize()
        passed = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + passed
        self.own[name] = self.own.get(name, 0.0) + passed - (here.waited - waited)

    def of_each(self, name: str, items: Iterator[T]) -> Iterator[T]:
        """The items, with the time that it takes to get each."""
        while True:
            with self(name):
                item = next(items, None)
            if item is None:
                return
            yield item
