"""A rank that dies ends every rank within a minute and by its number, instead of a hang until the collectives time out.

Only some ranks notice a death by themselves: gloo tells those that talk to the dead rank ("Connection closed by peer"), the
others wait for each other, and NCCL inside a machine tells nobody. So every rank has a thread that writes a counter to the
process group's store, and looks at the counter of one other rank, the next one in a ring: N ranks cost the store O(N) small
operations a beat. A counter that stands still for `SILENT_SECONDS` is a death. Whoever sees it writes a verdict to the store,
every rank finds that at its next beat, prints it as one line and leaves with code 1.

    killed, stopped, its machine lost     silent; named by the rank that watches it
    an error that is a defect             traceback as ever; the rank names itself, so that others need not wait
    a UserError                           silent: if it is every rank's, all have printed it and left before anybody is named
    an error because another rank died    goes on beating while it waits for the verdict on that other rank
    a normal end                          says "done"; who watched it watches the next one, and waits for nobody

The store lives in rank 0's process, or beside it in torchrun's agent, and can die or freeze as well. A thread of its own sees
that the beat has come to a halt, and says so after `SILENT_SECONDS`. Rank 0 must therefore not be the first to finish by more
than that (here it writes the report, and is the last).

Silence is counted in one's own beats: clocks need not agree, and a job that is suspended and continued as a whole goes on.
What cannot be told from a death is a call that keeps the GIL for `SILENT_SECONDS`, because it keeps this thread from beating;
torch releases the GIL in its operators, in collectives and while it waits for a GPU.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from oprd_megatron.errors import UserError

BEAT_SECONDS = 3.0
SILENT_SECONDS = 20.0
VERDICT = "verdict"
DONE, FAILED, SILENT = "done", "failed", "silent"
"""How a rank ends, for those that watch it."""


@contextlib.contextmanager
def heartbeat(beat_seconds: float = BEAT_SECONDS, silent_seconds: float = SILENT_SECONDS) -> Iterator[None]:
    """Run what all ranks do together; the process leaves with code 1 and one line if another rank dies meanwhile.

    Collective, once at the start (one broadcast of a short string); leaving waits for no other rank.
    """
    if dist.get_world_size() == 1:
        yield
        return
    heart = _Heart(beat_seconds, silent_seconds)
    ending = SILENT
    try:
        yield
        ending = DONE
    except Exception as error:
        if _lost_another_rank(error):
            time.sleep(2 * silent_seconds)  # the verdict ends this process; without one the error is this rank's own
        ending = SILENT if isinstance(error, UserError) else FAILED
        raise
    finally:
        heart.stop(ending)


class _Heart:
    """The two threads of one rank."""

    def __init__(self, beat_seconds: float, silent_seconds: float) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.beat_seconds, self.silent_seconds = beat_seconds, silent_seconds
        name = [uuid.uuid4().hex]  # a restarted world may find the old one's keys in the same store
        dist.broadcast_object_list(name, src=0)
        self.store = dist.PrefixStore(f"heartbeat/{name[0]}", _own_client())
        self.beats = 0
        self.ending = SILENT
        self.stopped = threading.Event()
        self.beating = threading.Thread(target=self._beat, daemon=True)
        self.beating.start()
        threading.Thread(target=self._watch_store, daemon=True).start()

    def stop(self, ending: str) -> None:
        """End both threads. The beat says the last word, and is not waited for if the store keeps it."""
        self.ending = ending
        self.stopped.set()
        self.beating.join(self.beat_seconds)

    def _beat(self) -> None:
        watched, seen, silent = self._after(self.rank), b"", 0.0
        with contextlib.suppress(RuntimeError):  # the store is gone: `_watch_store` sees that `beats` stands still
            while not self.stopped.is_set():
                self.store.set(str(self.rank), str(self.beats))
                counter = self.store.get(str(watched)) if self.store.check([str(watched)]) else b""
                if counter == DONE.encode() and watched != self.rank:
                    watched, seen, silent = self._after(watched), b"", 0.0
                elif counter != seen or watched == self.rank:
                    seen, silent = counter, 0.0
                else:
                    silent += self.beat_seconds
                if silent >= self.silent_seconds:
                    self._give_verdict(f"rank {watched} died (no sign of life for {self.silent_seconds:g} s)")
                if self.store.check([VERDICT]):
                    self._leave(self.store.get(VERDICT).decode())
                self.beats += 1
                self.stopped.wait(self.beat_seconds)
            if self.ending == DONE:
                self.store.set(str(self.rank), DONE)
            elif self.ending == FAILED:
                self._give_verdict(f"rank {self.rank} died (it stopped with an error)")

    def _give_verdict(self, verdict: str) -> None:
        """Tell every rank who died. The first verdict stands: what others die of afterwards is a consequence."""
        self.store.compare_set(VERDICT, "", verdict)

    def _watch_store(self) -> None:
        seen, silent = -1, 0.0
        while not self.stopped.wait(self.beat_seconds):
            seen, silent = self.beats, silent + self.beat_seconds if seen == self.beats else 0.0
            if silent >= self.silent_seconds:
                self._leave(f"rank 0 or its launcher died (their store has not answered for {self.silent_seconds:g} s)")

    def _after(self, rank: int) -> int:
        return (rank + 1) % self.world_size

    def _leave(self, verdict: str) -> None:
        speaker = "error" if self.rank == 0 else f"error on rank {self.rank}"
        line = f"{speaker}: {verdict}; its own output says why. Start again: a run resumes from its last checkpoint\n"
        sys.stderr.write(line)
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(1.5 * self.beat_seconds)  # the store may end with this rank: let others read the verdict first
        os._exit(1)


def _own_client() -> dist.Store:
    """The default group's store. One connection of a TCPStore is busy while the main thread waits for a key: take another."""
    store = _get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        return dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)
    return store


def _lost_another_rank(error: BaseException | None) -> bool:
    """Whether a broken or timed out connection is behind an error. Gloo raises plain RuntimeErrors that name its files."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
