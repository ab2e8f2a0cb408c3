"""A rank that dies ends every rank within a minute and by its number, instead of a hang until the collectives time out.

Only some ranks notice a death by themselves: gloo tells those that talk to the dead rank ("Connection closed by peer"), the
others wait for each other, and NCCL inside a machine tells nobody. So every rank has a thread that writes a counter to the
process group's store, with the place that the rank is in (`activity.py`), and looks at the counter of one other rank, the next
one in a ring: N ranks cost the store O(N) small operations a beat. A counter that stands still for `SILENT_SECONDS` is a death.
Whoever sees it writes a verdict to the store, every rank finds that at its next beat, prints it as one line and leaves with
code 1. A world whose ranks all beat and none moves is ended in the same way (`hang.py`): each counts up one number in the store
in a beat in which something moved, and all look at it.

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
import json
import multiprocessing
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from oprd_megatron.errors import UserError
from oprd_megatron.parallel.activity import Place, here
from oprd_megatron.parallel.hang import Hang, hang_line, hang_report, who_dumps, write_stacks

BEAT_SECONDS = 3.0
SILENT_SECONDS = 20.0
VERDICT, MOVES, REPORTER = "verdict", "moves", "reporter"
"""Keys of the store besides each rank's number: what ends all, beats in which a rank moved, who reports a hang."""
DONE, FAILED, SILENT = "done", "failed", "silent"
"""How a rank ends, for those that watch it."""
ADVICE = "Start again: a run resumes from its last checkpoint"


@contextlib.contextmanager
def heartbeat(
    beat_seconds: float = BEAT_SECONDS, silent_seconds: float = SILENT_SECONDS, hang: Hang | None = None
) -> Iterator[None]:
    """Run what all ranks do together; the process leaves with code 1 and one line if another rank dies meanwhile, or nothing
    moves for as long as `hang` says.

    Collective, once at the start (one broadcast of a short string); leaving waits for no other rank.
    """
    if dist.get_world_size() == 1 and hang is None:
        yield
        return
    heart = _Heart(beat_seconds, silent_seconds, hang)
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


@dataclass(frozen=True)
class Verdict:
    """Why all ranks end.

    Attributes:
        line: for every rank's output.
        report: for rank 0's; "" if the line says all.
        folder: for stacks; "" for none.
        dump: ranks that write theirs.
    """

    line: str
    report: str = ""
    folder: str = ""
    dump: tuple[int, ...] = ()


class _Heart:
    """The two threads of one rank."""

    def __init__(self, beat_seconds: float, silent_seconds: float, hang: Hang | None) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.beat_seconds, self.silent_seconds, self.hang = beat_seconds, silent_seconds, hang
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
        moves = _Moves(self.store)
        with contextlib.suppress(RuntimeError):  # the store is gone: `_watch_store` sees that `beats` stands still
            while not self.stopped.is_set():
                self.store.set(str(self.rank), json.dumps({"beats": self.beats, "place": asdict(here.place())}))
                counter = self.store.get(str(watched)) if self.store.check([str(watched)]) else b""
                if counter == DONE.encode() and watched != self.rank:
                    watched, seen, silent = self._after(watched), b"", 0.0
                elif counter != seen or watched == self.rank:
                    seen, silent = counter, 0.0
                else:
                    silent += self.beat_seconds
                if silent >= self.silent_seconds:
                    last = f"; last in {_place(seen)}" if seen else ""
                    self._give_verdict(
                        Verdict(f"rank {watched} died (no sign of life for {self.silent_seconds:g} s{last})")
                    )
                if self.hang is not None and moves.still_for(self.beat_seconds) >= self.hang.seconds:
                    self._report_hang(self.hang)
                if self.store.check([VERDICT]):
                    self._leave(Verdict(**json.loads(self.store.get(VERDICT))))
                self.beats += 1
                self.stopped.wait(self.beat_seconds)
            if self.ending == DONE:
                self.store.set(str(self.rank), DONE)
            elif self.ending == FAILED:
                self._give_verdict(Verdict(f"rank {self.rank} died (it stopped with an error in {here.place()})"))

    def _give_verdict(self, verdict: Verdict) -> None:
        """Tell every rank who died. The first verdict stands: what others die of afterwards is a consequence."""
        self.store.compare_set(VERDICT, "", json.dumps(asdict(verdict)))

    def _report_hang(self, hang: Hang) -> None:
        """The first to see it asks where all are, which costs the store one reading of each rank's number."""
        if self.store.compare_set(REPORTER, "", str(self.rank)) != str(self.rank).encode():
            return
        places = {}
        for rank in range(self.world_size):
            value = self.store.get(str(rank)) if self.store.check([str(rank)]) else DONE.encode()
            if value != DONE.encode():
                places[rank] = _place(value)
        folder = hang.folder / time.strftime("%Y-%m-%dT%H-%M-%S")
        line = f"{hang_line(places, hang.seconds)}; report and stacks in {folder}"
        self._give_verdict(Verdict(line, hang_report(places, hang.seconds), str(folder), tuple(who_dumps(places))))

    def _watch_store(self) -> None:
        seen, silent = -1, 0.0
        while not self.stopped.wait(self.beat_seconds):
            seen, silent = self.beats, silent + self.beat_seconds if seen == self.beats else 0.0
            if silent >= self.silent_seconds:
                self._leave(
                    Verdict(f"rank 0 or its launcher died (their store has not answered for {self.silent_seconds:g} s)")
                )

    def _after(self, rank: int) -> int:
        return (rank + 1) % self.world_size

    def _leave(self, verdict: Verdict) -> None:
        self.stopped.set()
        speaker = "error" if self.rank == 0 else f"error on rank {self.rank}"
        why = "" if verdict.report else "; its own output says why"
        sys.stderr.write(verdict.report if self.rank == 0 else "")
        sys.stderr.write(f"{speaker}: {verdict.line}{why}. {ADVICE}\n")
        sys.stdout.flush()
        sys.stderr.flush()
        if self.rank in verdict.dump:  # not waited for on a disk that hangs
            arguments = (Path(verdict.folder), self.rank, verdict.report)
            writing = threading.Thread(target=write_stacks, args=arguments, daemon=True)
            writing.start()
            writing.join(self.silent_seconds)
        time.sleep(1.5 * self.beat_seconds)  # the store may end with this rank: let others read the verdict first
        for child in multiprocessing.active_children():  # a writer of checkpoints would outlive this process
            child.kill()
        os._exit(1)


class _Moves:
    """Whether any rank moves: one number in the store, which a rank counts up in a beat after it has moved."""

    def __init__(self, store: dist.Store) -> None:
        self.store, self.own, self.seen, self.still = store, -1, -1, 0.0

    def still_for(self, beat_seconds: float) -> float:
        """Called once a beat. Returns the seconds, in beats, for which no rank has moved."""
        moved, self.own = here.marks != self.own, here.marks
        total = self.store.add(MOVES, int(moved))
        self.seen, self.still = total, 0.0 if total != self.seen else self.still + beat_seconds
        return self.still


def _place(value: bytes) -> Place:
    """Of a rank's number in the store."""
    return Place(**json.loads(value)["place"])


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
