"""When a checkpoint counts: written at once, or in the background while training goes on.

    at once         all ranks write, then rank 0 renames the directory and the tracker file names it
    background      each rank forks a process that writes what its memory held at the fork; the rank trains on. Once all
                    processes of all ranks are done, rank 0 renames and names it: looked after at each step, before the next
                    save, at the end, when the run is asked to stop, and when all ranks end with the same error

Until then the directory ends in .incomplete, and nothing reads it. What a background save needs of memory: on a GPU a copy of
this rank's share in host memory; on a CPU the pages that training changes meanwhile, which are copied as they change.

A writer lives as long as its rank (`writer_processes.py`).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.distributed_c10d import _get_default_store

from oprd_megatron.averaging import AveragedTeacher
from oprd_megatron.config import RunConfig
from oprd_megatron.errors import ConfigError, UserError
from oprd_megatron.models import Model
from oprd_megatron.optimizer import StudentOptimizer
from oprd_megatron.parallel.activity import here
from oprd_megatron.parallel.agreement import together
from oprd_megatron.platform import Platform
from oprd_megatron.representation.bridge import Bridge
from oprd_megatron.rollout.buffer import FOLDER as ROLLOUTS
from oprd_megatron.rollout.buffer import forget
from oprd_megatron.saving.checkpoint import (
    Progress,
    add_to_checkpoint,
    publish_checkpoint,
    staging_of,
    write_checkpoint,
    writing,
)
from oprd_megatron.saving.retention import Figures, figures_of, read_figures, step_of
from oprd_megatron.saving.writer_processes import as_writer, results_queue

LEAVING_SECONDS = 10.0
"""How long a rank that ends with an error waits for all others to do the same."""


class Saver:
    """Saves a run's checkpoints, for the length of a `with` block. Every method is collective but `note`.

    Args:
        config: the run.
        platform: of this rank.

    Raises:
        ConfigError: background saves are not supported here.
    """

    def __init__(self, config: RunConfig, platform: Platform) -> None:
        self.config, self.platform = config, platform
        if config.checkpoint.asynchronous and sys.platform != "linux":
            raise ConfigError("checkpoint.asynchronous: needs Linux (its writers end with their rank); set it to false")
        self.figures: Figures = {}
        self._pending: Path | None = None
        self._calls = AsyncCallsQueue()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._pending is None:
            return
        if kind is None or (issubclass(kind, UserError) and self._all_leave(self._pending)):
            with contextlib.suppress(UserError) if kind else contextlib.nullcontext():
                self.finish()
        for child in multiprocessing.active_children():  # those of a save that is given up
            child.kill()

    def resumed(self, checkpoint: Path) -> None:
        """Go on from a checkpoint, with its figures."""
        self.figures = read_figures(checkpoint)

    def note(self, record: dict[str, Any]) -> None:
        """Take the figures of an eval or benchmark record: the next checkpoints have them."""
        self.figures |= figures_of(record)

    def save(
        self,
        student: Model,
        optimizer: StudentOptimizer | None,
        progress: Progress,
        bridge: Bridge | None = None,
        average: AveragedTeacher | None = None,
    ) -> None:
        """Save; in the background, if the config says so. `optimizer` is None on ranks without a student, `bridge` and
        `average` where the run has none.

        Raises:
            CheckpointError, UserError: this or the save before could not be written; the newest complete one is untouched.
        """
        self.finish()
        background = self.config.checkpoint.asynchronous
        # mcore's own queue would end with the first SIGTERM, and outlive a killed rank
        if filesystem_async._results_queue is None:
            filesystem_async._results_queue = results_queue()
        with here.phase("checkpoint"):
            final, request = write_checkpoint(
                self.config, student, optimizer, progress, self.platform, average, background
            )
            with together(f"writing beside {final}"):
                if dist.get_rank() == 0:
                    add_to_checkpoint(final, student, bridge, self.figures)
            if request is None:
                self._publish(final)
                return
            if request.async_fn is not None:
                request = request._replace(async_fn=partial(as_writer, os.getpid(), request.async_fn))
            with self.platform.scope():
                self._calls.schedule_async_request(request)
            self._pending = final

    def poll(self) -> None:
        """Publish what is being written in the background, if it is done. One all-reduce of a number while there is any.

        Raises:
            CheckpointError, UserError: as `save`.
        """
        self._finalize(wait=False)

    def finish(self) -> None:
        """Wait for what is being written in the background, and publish it.

        Raises:
            CheckpointError, UserError: as `save`.
        """
        with here.phase("checkpoint"):
            self._finalize(wait=True)

    def _finalize(self, wait: bool) -> None:
        if self._pending is None:
            return
        final = self._pending
        with self.platform.scope(), writing(staging_of(final)):
            done = self._calls.maybe_finalize_async_calls(blocking=wait)
        if done:
            self._pending = None
            self._publish(final)

    def _publish(self, final: Path) -> None:
        with together(f"publishing {final}"):
            if dist.get_rank() == 0:
                publish_checkpoint(final, self.config.checkpoint)
                forget(self.config.run.dir / ROLLOUTS, step_of(final))

    def _all_leave(self, pending: Path) -> bool:
        """Whether every rank ends with a user's error, as this one does: then they can finish together."""
        store, key = _get_default_store(), f"leaving/{pending.name}"
        deadline = time.monotonic() + LEAVING_SECONDS
        there = store.add(key, 1)
        while there < dist.get_world_size() and time.monotonic() < deadline:
            time.sleep(0.05)
            there = store.add(key, 0)
        return there == dist.get_world_size()
