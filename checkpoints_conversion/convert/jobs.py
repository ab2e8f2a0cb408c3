"""Many files written by several processes, so that a kill at any moment loses only the files in the making.

    OUT.incomplete/            everything is written here and renamed to OUT when it is complete
        journal.jsonl          first line: what is converted and how; then a line for every finished file
        model-00001-of-00004.safetensors
        model-00002-of-00004.safetensors.part     in the making

A file is written as `.part`, renamed, and only then entered in the journal; a name in the journal therefore stands for a
whole file, and what is not in it is written again. A resume also compares every finished file with its checksums, so
that neither a lost page nor a stray hand is taken for a finished file.

A file may have several segments, which different processes write at the same time.
"""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from checkpoints_conversion.convert.memory import peak_bytes
from checkpoints_conversion.convert.progress import Progress
from oprd_megatron.errors import CheckpointError

JOURNAL = "journal.jsonl"
MANIFEST = "conversion.json"
MANIFEST_VERSION = 1
REFRESH_SECONDS = 0.2
Records = list[dict[str, Any]]
"""What a segment wrote, tensor by tensor, as plain JSON: names, shapes, dtypes, places and checksums."""


class Job(Protocol):
    """A conversion: files to write, each in segments. Goes to the worker processes by pickle."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the output, as JSON: an unfinished conversion is continued only by its equal."""

    @property
    def file_names(self) -> Sequence[str]:
        """Relative paths, in order."""

    def num_segments(self, file: int) -> int:
        """Segments of a file."""

    def nbytes(self, file: int) -> int:
        """Bytes that a file takes, for progress."""

    def begin(self, file: int, path: Path) -> None:
        """Make the file, ready for its segments."""

    def write(self, file: int, segment: int, path: Path, advance: Callable[[int], None]) -> Records:
        """Write one segment; say how many bytes were written as they are."""

    def check(self, path: Path, records: Records, advance: Callable[[int], None]) -> None:
        """Compare a finished file with its records.

        Raises:
            CheckpointError: they differ.
        """


def staging_of(out: Path) -> Path:
    """Where a conversion to `out` is written until it is complete."""
    return out.with_name(out.name + ".incomplete")


def run_job(
    job: Job, staging: Path, workers: int, progress: Progress, guard: Callable[[], None] = lambda: None
) -> dict[str, Records]:
    """Write all files of a job into its staging directory, those that are there already excepted.

    Args:
        staging: see `staging_of`.
        workers: processes.
        guard: called every now and then; what it raises ends the conversion.

    Returns:
        The records of every file, in the job's order.

    Raises:
        CheckpointError: the disk is full, the source broke, or a process died; what was finished stays.
    """
    with _locked(staging) as journal:
        done = _read_journal(journal, job)
        with _pool(job, workers, progress, guard) as pool:
            _check_finished(job, staging, done, pool, progress)
            _write_missing(job, staging, done, pool, progress, journal)
    return {name: done[name] for name in job.file_names}


def publish(staging: Path, out: Path, manifest: dict[str, Any]) -> None:
    """Turn a complete staging directory into `out`."""
    (staging / MANIFEST).write_text(json.dumps({"version": MANIFEST_VERSION, **manifest}) + "\n", encoding="utf-8")
    (staging / JOURNAL).unlink()
    put_in_place(staging, out)


def put_in_place(staging: Path, out: Path) -> None:
    """Rename a directory; an old one steps aside first, so that there is never half of each."""
    if not out.exists():
        staging.rename(out)
        return
    old = out.with_name(out.name + ".old")
    if old.exists():
        shutil.rmtree(old)
    out.rename(old)
    staging.rename(out)
    shutil.rmtree(old)


class _Pool:
    """Runs segments in worker processes, or here if there is only one."""

    def __init__(self, job: Job, workers: int, progress: Progress, guard: Callable[[], None]) -> None:
        self._progress, self._guard, self.size = progress, guard, workers
        self._executor: ProcessPoolExecutor | None = None
        if workers > 1:
            # A fork starts at once, but not safely where torch's threads run.
            context = multiprocessing.get_context("spawn" if "torch" in sys.modules else "fork")
            self._executor = ProcessPoolExecutor(workers, context, _start_worker, (job, progress.share(context)))
        else:
            _start_worker(job, None, progress.advance)

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        if self._executor is not None:
            return self._executor.submit(work, *arguments)
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future

    def wait(self, futures: set[Future[Any]]) -> set[Future[Any]]:
        """Wait until at least one is done; return those, and take them out of `futures`."""
        while True:
            done, _ = wait(futures, timeout=REFRESH_SECONDS, return_when=FIRST_COMPLETED)
            self._progress.refresh()
            self._guard()
            if done:
                futures -= done
                return done

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _pool(job: Job, workers: int, progress: Progress, guard: Callable[[], None]) -> Iterator[_Pool]:
    pool = _Pool(job, workers, progress, guard)
    try:
        yield pool
    except BrokenProcessPool:
        raise CheckpointError(
            "a worker process died (out of memory?); continue with --resume, and fewer --workers"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(f"{error.filename or 'output'}: {error.strerror}; continue with --resume") from error
        raise CheckpointError("the disk is full; free space and continue with --resume") from error
    finally:
        pool.close()


_WORKER: tuple[Job, Callable[[int], None]]


def _start_worker(job: Job, counter: Any, advance: Callable[[int], None] | None = None) -> None:
    """In each process, before its first segment."""
    global _WORKER
    if advance is None:
        threading.Thread(target=_exit_with_parent, daemon=True).start()

    def count(nbytes: int) -> None:
        with counter.get_lock():
            counter.value += nbytes

    _WORKER = job, advance or count


def _exit_with_parent() -> None:
    """A killed conversion leaves no process behind that still writes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _write_segment(file: int, segment: int, path: Path) -> tuple[Records, int, int]:
    """The segment's records; this process, and the most bytes that it held so far."""
    job, advance = _WORKER
    records = job.write(file, segment, path, advance)
    return records, os.getpid(), peak_bytes()


def _check_file(path: Path, records: Records) -> None:
    job, advance = _WORKER
    job.check(path, records, advance)


def _check_finished(job: Job, staging: Path, done: dict[str, Records], pool: _Pool, progress: Progress) -> None:
    """Forget finished files that are not what the journal says."""
    total = sum(job.nbytes(file) for file, name in enumerate(job.file_names) if name in done)
    progress.phase("checking finished files" if done else "", total)
    names = {pool.submit(_check_file, staging / name, records): name for name, records in done.items()}
    waiting = set(names)
    while waiting:
        for future in pool.wait(waiting):
            try:
                future.result()
            except (CheckpointError, OSError) as error:
                progress.note(f"{error}: written again")
                del done[names[future]]


def _write_missing(
    job: Job, staging: Path, done: dict[str, Records], pool: _Pool, progress: Progress, journal: Any
) -> None:
    todo = [file for file, name in enumerate(job.file_names) if name not in done]
    progress.phase("converting", sum(job.nbytes(file) for file in todo))
    left: dict[int, int] = {}
    results: dict[int, dict[int, Records]] = {}
    segments: dict[Future[Any], tuple[int, int]] = {}
    waiting: set[Future[Any]] = set()
    queue = iter(_spread(job, todo, pool.size))
    while True:
        for file, segment in queue:
            if file not in left:
                left[file], results[file] = job.num_segments(file), {}
                job.begin(file, _part(staging, job.file_names[file]))
            future = pool.submit(_write_segment, file, segment, _part(staging, job.file_names[file]))
            segments[future] = (file, segment)
            waiting.add(future)
            if len(waiting) >= 2 * pool.size:
                break
        if not waiting:
            return
        for future in pool.wait(waiting):
            file, segment = segments.pop(future)
            results[file][segment], process, held = future.result()
            progress.memory[process] = held
            left[file] -= 1
            if not left[file]:
                name = job.file_names[file]
                done[name] = [record for _, records in sorted(results.pop(file).items()) for record in records]
                _part(staging, name).rename(staging / name)
                _append(journal, {"file": name, "records": done[name]})


def _spread(job: Job, files: list[int], workers: int) -> list[tuple[int, int]]:
    """(file, segment) in an order that keeps processes off each other's files: a system lets one at a time write to a file."""
    queue = []
    for first in range(0, len(files), workers):
        some = files[first : first + workers]
        for segment in range(max(job.num_segments(file) for file in some)):
            queue += [(file, segment) for file in some if segment < job.num_segments(file)]
    return queue


def _part(staging: Path, name: str) -> Path:
    return staging / f"{name}.part"


@contextmanager
def _locked(staging: Path) -> Iterator[Any]:
    """The journal, open for reading and appending, by one conversion at a time."""
    staging.mkdir(parents=True, exist_ok=True)
    with open(staging / JOURNAL, "a+", encoding="utf-8") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{staging}: another process is writing it; wait for it, or choose another output"
            ) from None
        yield journal


def _read_journal(journal: Any, job: Job) -> dict[str, Records]:
    """Records of the finished files; begins the journal if it is empty. A torn last line is dropped."""
    journal.seek(0)
    text = journal.read()
    lines = text.split("\n")
    if lines[-1]:
        journal.truncate(len(text.encode()) - len(lines[-1].encode()))
    entries = [json.loads(line) for line in lines[:-1]]
    if not entries:
        _append(journal, job.identity)
        return {}
    differing = sorted(key for key in job.identity if entries[0].get(key) != job.identity[key])
    if differing:
        raise CheckpointError(
            f"{Path(journal.name).parent}: was begun with another {' and '.join(differing)}; "
            "repeat that command, or begin again with --overwrite"
        )
    return {entry["file"]: entry["records"] for entry in entries[1:] if entry["file"] in job.file_names}


def _append(journal: Any, entry: dict[str, Any]) -> None:
    journal.write(json.dumps(entry) + "\n")
    journal.flush()
    os.fdatasync(journal.fileno())
