"""A world that is alive but does not move: who is where, and for whom the others wait.

A collective that waits for ever, a loop without end, a disk or a rollout engine that does not answer: every rank goes on
beating, and without this only the time limits of collectives would end the job, with a message about the ranks that waited. Any
mark of any rank (`activity.py`) counts as progress: a phase entered or left, a token or a response written, a micro-batch gone
forward. Long rollouts are therefore no hang; an engine that is silent for as long as `Hang.seconds` is one.

The odd ranks, which the others wait for: those whose main thread is not itself in a call that waits, where others are; where
all wait or none, those outside of the (step, phase) that most ranks are in.
"""

from __future__ import annotations

import faulthandler
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from oprd_megatron.parallel.activity import Place

SHOWN = 4
"""Odd ranks that the line names; the report has all."""
MINUTES_TO_REPORT = 10.0
"""Collectives time out so much after `run.hang_minutes`."""


@dataclass(frozen=True)
class Hang:
    """When a world counts as hanging, and where the report goes.

    Attributes:
        seconds: without progress on any rank.
        folder: gets a folder for each hang: report.txt and rank_N.txt, the stacks of the odd ranks.
    """

    seconds: float
    folder: Path


def collective_minutes(hang_minutes: float) -> float:
    """When a collective of a run gives up: not before a hang has been reported."""
    return max(30.0, hang_minutes + MINUTES_TO_REPORT)


def odd_ranks(places: Mapping[int, Place]) -> list[int]:
    """The ranks that the others wait for; none if all are in the same place."""
    working = [rank for rank, place in places.items() if not place.waits]
    if 0 < len(working) < len(places):
        return working
    where = Counter((place.step, place.phase) for place in places.values())
    (most, _), *_ = where.most_common(1)
    return [rank for rank, place in places.items() if (place.step, place.phase) != most]


def hang_line(places: Mapping[int, Place], seconds: float) -> str:
    """What everybody is told: "no rank has made progress for 20 min: rank 3 (node-a) is in phase .."."""
    odd = odd_ranks(places)
    start = f"no rank has made progress for {_duration(seconds)}"
    if not odd:
        first = next(iter(places.values()))
        who = "it" if len(places) == 1 else f"all {len(places)} ranks"
        return f"{start}: {who} stayed in {first} (at {first.line})"
    named = [f"rank {rank} ({places[rank].host}) is in {places[rank]} (at {places[rank].line})" for rank in odd[:SHOWN]]
    more = f", so are {len(odd) - SHOWN} more" if len(odd) > SHOWN else ""
    return f"{start}: {', '.join(named)}{more}, and the others wait"


def hang_report(places: Mapping[int, Place], seconds: float) -> str:
    """A table with a row for each group of ranks that are in the same place; odd ones are marked."""
    odd, groups = set(odd_ranks(places)), dict[tuple[object, ...], list[int]]()
    for rank, place in places.items():
        groups.setdefault((place.step, place.phase, place.waits, place.line, rank in odd), []).append(rank)
    rows = [("step", "phase", "in it for", "last sign", "ranks", "", "at")]
    for ranks in sorted(groups.values(), key=len):
        place = places[ranks[0]]
        longest, still = (max(getattr(places[rank], key) for rank in ranks) for key in ("seconds", "still"))
        state = ("waits" if place.waits else "works") + (" <- odd" if ranks[0] in odd else "")
        step = "-" if place.step is None else str(place.step)
        rows.append((step, place.phase, _duration(longest), _duration(still), as_ranges(ranks), state, place.line))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    hosts = [f"rank {rank} is on {places[rank].host}" for rank in sorted(odd)]
    return "\n".join([f"no rank has made progress for {_duration(seconds)}:", *lines, *hosts]) + "\n"


def who_dumps(places: Mapping[int, Place]) -> list[int]:
    """The ranks whose stacks are written down: the odd ones, and one of the others."""
    odd = odd_ranks(places)
    return sorted({*odd, *[rank for rank in sorted(places) if rank not in odd][:1]})


def write_stacks(folder: Path, rank: int, report: str) -> None:
    """This process's stacks of all threads, as rank_N.txt; and the report, which is the same whoever writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.txt").write_text(report)
    with (folder / f"rank_{rank}.txt").open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)


def as_ranges(ranks: Sequence[int]) -> str:
    """0-2,5 of [0, 1, 2, 5]."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.3g} min" if seconds >= 60 else f"{seconds:.3g} s"
