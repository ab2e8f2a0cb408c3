"""Answers are compared as mathematics, and no answer stops the grader."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from oprd_megatron.benchmarks.grading import WORKER_BYTES, Grade, Grader, keep_parsable
from oprd_megatron.errors import ConfigError, DataError

pytest.importorskip("math_verify")


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(seconds=3, num_workers=2) as made:
        made.parse(["1"])  # so that no test waits for the first start
        yield made


def boxed(text: str) -> str:
    return f"So the answer is $\\boxed{{{text}}}$."


@pytest.mark.parametrize(
    ("gold", "response", "correct"),
    [
        (r"\frac{14}{3}", boxed("14/3"), True),
        (r"\frac{1}{2}", boxed("0.5"), True),
        (r"\frac12", boxed(r"\dfrac{1}{2}"), True),
        ("142.0", boxed("142"), True),
        ("(1, 2]", boxed("(1,2]"), True),
        ("[1, 2]", boxed("(1,2)"), False),
        (r"\{1, 2, 3\}", boxed("3, 2, 1"), True),
        (r"\{1, 2, 3\}", boxed("1, 2"), False),
        (r"\left( 3, \frac{\pi}{2} \right)", boxed(r"(3, \pi/2)"), True),
        (r"\left( 3, \frac{\pi}{2} \right)", boxed(r"(\pi/2, 3)"), False),
        ("5", boxed(r"5\text{ cm}"), True),
        ("5", boxed("x = 5"), True),
        (r"\sqrt{\frac{1}{2}}", boxed(r"\frac{\sqrt{2}}{2}"), True),
        ("1 < x < 2", boxed("(1, 2)"), True),
        ("(1, 2)", boxed("1 < x < 2"), False),
        ("x + 1", boxed("y + 1"), False),
        (r"\text{Evelyn}", boxed("Evelyn"), True),
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", boxed(r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"), True),
        ("5", r"\boxed{5} or rather \boxed{6}", False),
        ("5", r"\boxed{6} or rather \boxed{5}", True),
        ("5", r"\boxed{5 \text{ or } 6}", False),
        ("5", r"\boxed{1, 2, 3, 4, 5, 6}", False),
        ("5", "The final answer is 5.", True),
        ("5", "the answer is $5$, I hope", True),
        ("5", "a" * 100_000 + boxed("5") + "b" * 100_000, True),
        ("5", boxed("5") + " \x00 \ud800", True),
    ],
)
def test_answers_are_compared_as_mathematics(grader: Grader, gold: str, response: str, correct: bool) -> None:
    """Fractions, intervals, sets, tuples, units, matrices; the last box counts, and a list of guesses does not."""
    assert grader.grade([(gold, response)])[0].correct is correct


@pytest.mark.parametrize(
    "response",
    [
        boxed("9^{9^{9^{9}}}"),
        boxed("10000000!"),
        "the answer is 9**9**9**9**9",
        boxed("{" * 900 + "5" + "}" * 900),
        boxed("(" * 900 + "5" + ")" * 900),
        boxed(r"\sum_{n=1}^{10^{12}} \frac{1}{n^{1.5}}"),
        boxed("1" * 100_000),
        boxed("1" * 1_900),
        "$" * 100_000,
        "answer " * 20_000,
        "\\boxed{" * 30_000,
        "(1+" * 300 + "1" + ")" * 300,
    ],
)
def test_no_answer_stops_the_grader(grader: Grader, response: str) -> None:
    """Numbers that fill no memory, depth that overflows stacks, texts that regexes choke on: wrong, in bounded time, and the
    next answer is graded as if nothing had been. Time: the limit of 3 s, another process, and room for a busy machine."""
    start = time.perf_counter()
    graded, after = grader.grade([("5", response), ("7", boxed("7"))])
    assert not graded.correct and after == Grade(True, "7", "graded")
    assert time.perf_counter() - start < 40


def test_a_slow_answer_is_told_apart(grader: Grader) -> None:
    """Status says why an answer counts as wrong; it keeps its text, to be looked at."""
    slow, huge, none = grader.grade([("5", boxed("9^{9^{9^{9}}}")), ("5", boxed("1" * 5_000)), ("5", "")])
    assert (slow.status, slow.answer) == ("timed out", "9^{9^{9^{9}}}")
    assert (huge.status, none.status) == ("too long", "no answer")


def test_a_killed_worker_costs_one_answer() -> None:
    """A reader that dies, as by the out-of-memory killer, is replaced; its answer is wrong and says so."""
    with Grader(seconds=30, num_workers=1) as grader:
        grader.parse(["1"])
        pid = grader._workers[0]._process.pid
        threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
        first, second = grader.grade([("5", boxed("9^{9^{9^{9}}}")), ("5", boxed("5"))])
        assert first.status == "crashed" and second.correct
        os.kill(grader._workers[0]._process.pid, signal.SIGKILL)
        grader._workers[0]._process.wait()
        assert grader.grade([("5", boxed("5"))])[0].correct


def test_an_orphan_ends_by_itself() -> None:
    """Whoever would have killed it is gone: the kernel ends an endless computation after so many seconds of it."""
    command = [sys.executable, "-m", "oprd_megatron.benchmarks.grading_worker", str(WORKER_BYTES), "1"]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    worker.communicate(
        json.dumps({"do": "grade", "gold": "5", "text": "9^{9^{9^{9}}}", "boxed": True}) + "\n", timeout=60
    )
    assert worker.returncode == -signal.SIGXCPU


def test_any_thread_may_grade(grader: Grader) -> None:
    """math-verify's own limits refuse every thread but the main one."""
    found: list[Grade] = []
    thread = threading.Thread(target=lambda: found.extend(grader.grade([("5", boxed("10/2"))])))
    thread.start()
    thread.join()
    assert found[0].correct


def test_many_answers_in_order(grader: Grader) -> None:
    """Several workers, answers found twice compared once: each grade is at its own place."""
    pairs = [(str(number % 97), boxed(str(number % 89))) for number in range(300)]
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    grades = grader.grade(pairs + pairs, on_done=count)
    assert [grade.correct for grade in grades] == [n % 97 == n % 89 for n in range(300)] * 2
    assert calls == 300 and len(grader._workers) == 2


def test_equal_answers_share_a_class(grader: Grader) -> None:
    """By value, numbered as they come; a list with an endless one falls back to text and leaves the others alone."""
    lists = [["1/2", "3", "0.5", r"\frac12", "3.0"], ["9^{9^{9^9}}", "5", "5"], [], ["a"]]
    assert grader.group(lists) == [[0, 1, 0, 0, 1], [0, 1, 1], [], [0]]


def test_unreadable_right_answers_are_refused_or_left_out(grader: Grader) -> None:
    """The first is named, all are counted."""
    golds, places = (
        ["5", r"\frac{", "7", "&&"],
        ["f.json: item 1", "f.json: item 2", "f.json: item 3", "f.json: item 4"],
    )
    with pytest.raises(DataError, match=r"f.json: item 2: .* nor can 1 others of 4; .*--skip-unparsable"):
        keep_parsable(golds, places, grader, skip=False)
    assert keep_parsable(golds, places, grader, skip=True) == [True, False, True, False]
    with pytest.raises(DataError):
        keep_parsable(["&&"], ["f.json: item 1"], grader, skip=True)


def test_without_math_verify_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the extra."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'oprd-megatron\[eval\]'"):
        Grader()
