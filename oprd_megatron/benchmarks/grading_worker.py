"""A process that reads and compares answers: `python -m oprd_megatron.benchmarks.grading_worker BYTES SECONDS`.

One line of JSON in, one out; math-verify does the work. It has no time limit of its own: whoever started it kills it
(`grading`), because neither signals nor threads stop a loop inside a big integer's multiplication. Its memory is limited to
BYTES, so that such a number is an error instead of a full machine. Should the other process be killed, the kernel ends this
one after SECONDS of computing on one answer.

    {"do": "grade", "gold": "\\frac12", "text": "0.5", "boxed": true}     -> {"correct": true, "answer": "0.5"}
    {"do": "parse", "gold": "\\frac12"}                                   -> {"parsed": true}
    {"do": "group", "answers": ["0.5", "1/2", "3"], "seconds": 5}         -> {"groups": [0, 0, 1]}
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
import time
from typing import Any

READY = "ready"


def main() -> None:
    """Answer until the input ends."""
    limit, seconds = int(sys.argv[1]), int(sys.argv[2])
    _limit(resource.RLIMIT_AS, limit)
    _limit(resource.RLIMIT_CORE, 0)
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever a library prints is no reply
    import math_verify  # noqa: F401 (before the first answer's time runs)

    logging.disable(logging.CRITICAL)
    print(json.dumps(READY), file=replies, flush=True)
    for line in sys.stdin:
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + seconds)
        print(json.dumps(reply(json.loads(line))), file=replies, flush=True)


def reply(job: dict[str, Any]) -> dict[str, Any]:
    """What is asked, as at the top of this file."""
    if job["do"] == "grade":
        return grade(job["gold"], job["text"], job["boxed"])
    if job["do"] == "parse":
        gold = read(job["gold"], boxed=True)
        return {"parsed": any(not isinstance(part, str) for part in gold) and is_same(gold, gold)}
    return {"groups": group(job["answers"], job["seconds"])}


def grade(gold: str, text: str, boxed: bool) -> dict[str, Any]:
    """Whether a text's answer is the right one, and the answer as it was read; None where nothing was."""
    found = read(text, boxed)
    shown = text if boxed else next((part for part in reversed(found) if isinstance(part, str)), None)
    return {"correct": bool(found) and is_same(read(gold, boxed=True), found), "answer": shown if found else None}


def group(answers: list[str], seconds: float) -> list[int]:
    """The number of each answer's class of equals; a class is numbered where it is first seen. When the time is over, what is
    left is compared as text."""
    until, groups = time.monotonic() + seconds, list[int]()
    heads: list[tuple[str, list[Any] | None]] = []
    for answer in answers:
        parsed = read(answer, boxed=True) if time.monotonic() < until else None
        same = next((number for number, head in enumerate(heads) if _same(head, (answer, parsed), until)), None)
        if same is None:
            heads.append((answer, parsed))
        groups.append(len(heads) - 1 if same is None else same)
    return groups


def read(text: str, boxed: bool) -> list[Any]:
    """math-verify's reading of a text: expressions, and the text that they were read from."""
    from math_verify import parse

    return parse(f"\\boxed{{{text}}}" if boxed else text, parsing_timeout=None)


def is_same(gold: list[Any], found: list[Any]) -> bool:
    """math-verify's comparison; not symmetric: `gold` is the right answer."""
    from math_verify import verify

    return verify(gold, found, timeout_seconds=None)


def _limit(kind: int, value: int) -> None:
    """Set a limit of this process, within the one that it was given."""
    _, most = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if most == resource.RLIM_INFINITY else min(value, most), most))


def _same(head: tuple[str, list[Any] | None], other: tuple[str, list[Any] | None], until: float) -> bool:
    if head[0] == other[0]:
        return True
    if head[1] is None or other[1] is None or time.monotonic() >= until:
        return False
    return is_same(head[1], other[1])


if __name__ == "__main__":
    main()
