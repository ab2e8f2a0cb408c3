"""A weight that may change over a run: a number, or a broken line through (progress, weight) points.

    weight: 1.0                                constant
    weight: [[0, 1], [1, 0]]                   falls in a straight line over the run
    weight: [[0, 0], [0.5, 0], [0.5, 1]]       switched on half way: two points at one place are a jump, the later one counts

Progress is 0 at the first step and 1 at the last. Before the first point and after the last the line is flat.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from oprd_megatron.config.base import Fraction, NonNegative


def _in_order(points: list[tuple[Fraction, NonNegative]]) -> list[tuple[Fraction, NonNegative]]:
    places = [place for place, _ in points]
    if places != sorted(places):
        raise ValueError(f"points of a schedule are (progress, weight) in order of progress; these are at {places}")
    return points


Points = Annotated[list[tuple[Fraction, NonNegative]], Field(min_length=1), AfterValidator(_in_order)]
Schedule = NonNegative | Points


def weight_at(schedule: Schedule, progress: float) -> float:
    """The weight at `progress` in [0, 1]."""
    if not isinstance(schedule, list):
        return schedule
    before = [point for point in schedule if point[0] <= progress]
    after = [point for point in schedule if point[0] > progress]
    if not before or not after:
        return (before or after)[-1 if before else 0][1]
    (start, first), (end, last) = before[-1], after[0]
    return first + (last - first) * (progress - start) / (end - start)


def is_ever_on(schedule: Schedule) -> bool:
    """Whether the weight is above 0 at some time."""
    return any(weight > 0 for _, weight in schedule) if isinstance(schedule, list) else schedule > 0
