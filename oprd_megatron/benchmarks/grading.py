"""Grading answers that nobody has looked at: a model can write 9^{9^{9^9}}, a thousand nested roots or a megabyte of digits.

math-verify compares by computing, with sympy. Its own time limits are signals, which work in a main thread only and do not
stop arithmetic on huge integers. So it runs in processes of its own (`grading_worker`), one answer at a time: one that takes
too long, takes too much memory or crashes is killed, its answer is wrong, and another process takes its place.
"""

from __future__ import annotations

import importlib.util
import json
import math
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from oprd_megatron.benchmarks.answers import MOST_ANSWER_CHARS, answer_in
from oprd_megatron.benchmarks.grading_worker import READY
from oprd_megatron.errors import ConfigError, DataError
from oprd_megatron.platform import available_cores

Status = Literal["graded", "no answer", "too long", "timed out", "crashed"]
Job = dict[str, Any]
Reply = dict[str, Any] | Literal["timed out", "crashed"]

WORKER_BYTES = 4 * 2**30
"""Address space of a worker."""
START_SECONDS = 120.0
JOBS_PER_WORKER = 32
"""Fewer are not worth another process."""


@dataclass(frozen=True)
class Grade:
    """What became of one response.

    Attributes:
        correct: whether its answer is the right one.
        answer: as it was read, to show and to vote with; None if none was found.
        status: graded, or why it was not.
    """

    correct: bool
    answer: str | None
    status: Status


class Grader:
    """Reads and compares answers in worker processes; a context manager, which ends them.

    Args:
        seconds: for one answer.
        num_workers: at most; left out, one a core.

    Raises:
        ConfigError: math-verify is not installed.
    """

    def __init__(self, seconds: float = 5.0, num_workers: int | None = None) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError("grading needs math-verify; install it with `pip install 'oprd-megatron[eval]'`")
        self.seconds, self.num_workers = seconds, num_workers or available_cores()
        self._workers: list[_Worker] = []

    def __enter__(self) -> Grader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def grade(
        self, pairs: Iterable[tuple[str, str]], boxed_only: bool = False, on_done: Callable[[], object] = lambda: None
    ) -> list[Grade]:
        """Grade responses.

        Args:
            pairs: (right answer, response) each.
            boxed_only: a response without \\boxed has no answer.
            on_done: called after each that was compared.

        Returns:
            One a pair, in order. Pairs with the same right answer and the same found answer are compared once.
        """
        grades: dict[int, Grade] = {}
        asked: dict[tuple[str, str, bool], list[int]] = {}
        for place, (gold, response) in enumerate(pairs):
            found = answer_in(response, boxed_only)
            if found is None:
                grades[place] = Grade(False, None, "no answer")
            elif len(found.text) > MOST_ANSWER_CHARS:
                grades[place] = Grade(False, None, "too long")
            else:
                asked.setdefault((gold, found.text, found.boxed), []).append(place)
        jobs = [{"do": "grade", "gold": gold, "text": text, "boxed": boxed} for gold, text, boxed in asked]
        for (key, places), reply in zip(asked.items(), self._run(jobs, self.seconds, on_done), strict=True):
            for place in places:
                grades[place] = _grade(key[1], key[2], reply)
        return [grades[place] for place in range(len(grades))]

    def parse(self, golds: Sequence[str]) -> list[bool]:
        """Whether each right answer can be read, and equals itself."""
        jobs = [{"do": "parse", "gold": gold} for gold in golds]
        return [isinstance(reply, dict) and reply["parsed"] for reply in self._run(jobs, self.seconds)]

    def group(self, answers: Sequence[Sequence[str]]) -> list[list[int]]:
        """Classes of equal answers within each list: a number for each answer, from 0 in the order of appearance. What cannot
        be compared in `seconds` a list is compared as text."""
        wanted = [place for place, texts in enumerate(answers) if len(set(texts)) > 1]
        jobs = [{"do": "group", "answers": list(answers[place]), "seconds": self.seconds} for place in wanted]
        groups = [_as_text(texts) for texts in answers]
        for place, reply in zip(wanted, self._run(jobs, 2 * self.seconds + 1), strict=True):
            if isinstance(reply, dict):
                groups[place] = reply["groups"]
        return groups

    def _run(self, jobs: Sequence[Job], seconds: float, on_done: Callable[[], object] = lambda: None) -> list[Reply]:
        """Replies in the order of the jobs."""
        replies: dict[int, Reply] = {}
        waiting = deque(enumerate(jobs))
        wanted = min(self.num_workers, max(1, len(jobs) // JOBS_PER_WORKER), len(jobs))
        self._workers += [_Worker(self.seconds) for _ in range(wanted - len(self._workers))]
        busy: dict[int, tuple[_Worker, float]] = {}  # {job: who does it, until when}
        with selectors.DefaultSelector() as selector:
            idle = list(self._workers)
            while waiting or busy:
                while waiting and idle:
                    place, job = waiting.popleft()
                    worker = idle.pop()
                    worker.ask(job)
                    selector.register(worker.output, selectors.EVENT_READ, place)
                    busy[place] = worker, time.monotonic() + seconds
                first = min(until for _, until in busy.values())
                heard = {key.data for key, _ in selector.select(max(0.0, first - time.monotonic()))}
                for place, (worker, until) in list(busy.items()):
                    late = time.monotonic() >= until
                    if place in heard or late:
                        selector.unregister(worker.output)
                        replies[place] = worker.hear() if place in heard else "timed out"
                        if isinstance(replies[place], str):
                            worker.restart()
                        del busy[place]
                        idle.append(worker)
                        on_done()
        return [replies[place] for place in range(len(jobs))]


def keep_parsable(golds: Sequence[str], places: Sequence[str], grader: Grader, skip: bool) -> list[bool]:
    """Which right answers can be read.

    Args:
        golds: right answers.
        places: of each, for the message.
        grader: reads them.
        skip: leave out those that cannot be read, instead of refusing them.

    Raises:
        DataError: some cannot, or all.
    """
    parsed = grader.parse(golds)
    bad = [number for number, good in enumerate(parsed) if not good]
    if bad and (not skip or len(bad) == len(golds)):
        first = bad[0]
        raise DataError(
            f"{places[first]}: the right answer {golds[first][:60]!r} cannot be read by math-verify, nor can "
            f"{len(bad) - 1} others of {len(golds)}; mend them, or leave them out with --skip-unparsable"
        )
    return parsed


def _grade(text: str, boxed: bool, reply: Reply) -> Grade:
    if isinstance(reply, str):
        return Grade(False, text if boxed else None, reply)
    answer = reply["answer"]
    return Grade(reply["correct"], answer, "no answer" if answer is None else "graded")


def _as_text(texts: Sequence[str]) -> list[int]:
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return [numbers[text] for text in texts]


class _Worker:
    """One process, asked one thing at a time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = math.ceil(3 * seconds) + 5  # more than anybody waits for it
        self._start()

    def _start(self) -> None:
        module = "oprd_megatron.benchmarks.grading_worker"
        command = [sys.executable, "-m", module, str(WORKER_BYTES), str(self._seconds)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self.output = self._process.stdin, self._process.stdout
        self._ready = False

    def ask(self, job: Job) -> None:
        """Send a job; waits for a new process to be ready, so that its start takes none of the job's time."""
        if self._process.poll() is not None:
            self.restart()
        if not self._ready:
            with selectors.DefaultSelector() as selector:
                selector.register(self.output, selectors.EVENT_READ)
                there = selector.select(START_SECONDS)
            if not there or self.hear() != READY:
                self.kill()
                raise ConfigError("math-verify does not start here; look at `python -c 'import math_verify'`")
            self._ready = True
        self._input.write(json.dumps(job).encode() + b"\n")
        self._input.flush()

    def hear(self) -> Reply:
        """The reply that is there, or that the process is gone."""
        line = self.output.readline()
        return json.loads(line) if line.endswith(b"\n") else "crashed"

    def restart(self) -> None:
        """Another process in its place."""
        self.kill()
        self._start()

    def kill(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self.output.close()
        self._input.close()
