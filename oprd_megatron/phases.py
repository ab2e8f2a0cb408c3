"""Where a step's time goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from oprd_megatron.platform import Platform

T = TypeVar("T")


@dataclass
class Phases:
    """Seconds spent in each phase of a step, on this rank."""

    platform: Platform
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.platform.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def of_each(self, name: str, items: Iterator[T]) -> Iterator[T]:
        """The items, with the time that it takes to get each."""
        while True:
            with self(name):
                item = next(items, None)
            if item is None:
                return
            yield item
