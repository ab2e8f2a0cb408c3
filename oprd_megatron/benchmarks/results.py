"""From responses to figures: each problem's result, and the summary of a benchmark.

Shapes: P problems.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from oprd_megatron.benchmarks.grading import Grade, Grader
from oprd_megatron.benchmarks.intervals import interval
from oprd_megatron.benchmarks.measures import accuracy, best, distinct_ngrams, majority, pass_at
from oprd_megatron.benchmarks.problems import Problem

SEED = 0
"""Of the bootstrap."""

MEASURES = {
    "accuracy": "Avg@k",
    "best": "Best@k",
    "majority": "majority@k",
    "dist_4g": "Dist-4g",
    "tokens": "mean length, tokens",
    "truncated": "truncated",
    "no_answer": "without an answer",
}
"""{measure in files: what people call it}; each is a mean over problems."""


@dataclass(frozen=True)
class Response:
    """One response to a problem: its text, its token ids, and whether it ended by itself."""

    text: str
    token_ids: tuple[int, ...]
    finished: bool


@dataclass(frozen=True)
class ProblemResult:
    """One problem, a row of problems.csv.

    Attributes:
        benchmark, id, gold: of the problem.
        samples, correct: responses, and right ones.
        majority: whether the vote is right (`measures.majority`).
        voted: answer that won it; empty if nobody answered.
        voted_share: of the responses that gave it.
        dist_4g: NaN where all responses are short.
        tokens: mean length of the responses.
        truncated, no_answer: shares of responses that were cut, and that have no answer that can be read.
        stopped: responses whose answer took too long, was too long or crashed its reader.
    """

    benchmark: str
    id: str
    gold: str
    samples: int
    correct: int
    majority: float
    voted: str
    voted_share: float
    dist_4g: float
    tokens: float
    truncated: float
    no_answer: float
    stopped: int


def grade_all(
    problems: Sequence[Problem],
    responses: Sequence[Sequence[Response]],
    grader: Grader,
    boxed_only: bool = False,
    on_done: Callable[[], object] = lambda: None,
) -> tuple[list[ProblemResult], list[list[Grade]]]:
    """Grade every response of every problem.

    Args:
        problems: [P].
        responses: [P], at least one each.
        grader: reads answers.
        boxed_only: a response without \\boxed has no answer.
        on_done: called after each comparison.

    Returns:
        A result for each problem, and a grade for each of its responses.
    """
    pairs = [
        (problem.gold, response.text) for problem, own in zip(problems, responses, strict=True) for response in own
    ]
    flat = iter(grader.grade(pairs, boxed_only, on_done))
    grades = [[next(flat) for _ in own] for own in responses]
    wrong = [[grade.answer or "" for grade in own if grade.status == "graded" and not grade.correct] for own in grades]
    groups = grader.group(wrong)
    results = [
        _result(problem, own, graded, classes)
        for problem, own, graded, classes in zip(problems, responses, grades, groups, strict=True)
    ]
    return results, grades


def summarise(results: Sequence[ProblemResult]) -> dict[str, Any]:
    """Figures of one benchmark.

    Returns:
        {"problems", "samples": fewest, "stopped", each of `MEASURES`: {"value", "low", "high"}, "pass": {"1", "2", "4", .., and
        the fewest samples: the same}}; low and high bound the 95 % bootstrap interval; None where there is no figure.
    """
    samples = np.array([result.samples for result in results])
    correct = np.array([result.correct for result in results])
    fewest = int(samples.min())
    draws = sorted({2**power for power in range(int(math.log2(fewest)) + 1)} | {fewest})
    return {
        "problems": len(results),
        "samples": fewest,
        "stopped": sum(result.stopped for result in results),
        **{name: _figure(values_of(results, name)) for name in MEASURES},
        "pass": {str(number): _figure(pass_at(correct, samples, number)) for number in draws},
    }


def summarise_each(results: Sequence[ProblemResult]) -> dict[str, dict[str, Any]]:
    """{benchmark: its figures}, and "all" together if there are several."""
    names = list(dict.fromkeys(result.benchmark for result in results))
    found = {name: summarise([result for result in results if result.benchmark == name]) for name in names}
    return {**found, "all": summarise(results)} if len(names) > 1 else found


def values_of(results: Sequence[ProblemResult], measure: str) -> np.ndarray:
    """A measure of each problem, [P] float."""
    if measure == "accuracy":
        return accuracy(np.array([r.correct for r in results]), np.array([r.samples for r in results]))
    if measure == "best":
        return best(np.array([r.correct for r in results]))
    return np.array([vars(result)[measure] for result in results], dtype=float)


def _result(
    problem: Problem, responses: Sequence[Response], grades: Sequence[Grade], wrong: Sequence[int]
) -> ProblemResult:
    classes = iter(wrong)
    right = -1  # the class of all right answers
    groups = [right if grade.correct else next(classes) if grade.status == "graded" else None for grade in grades]
    vote = majority(groups, [grade.correct for grade in grades])
    voted = "" if vote.winner is None else grades[vote.winner].answer or ""
    answered = sum(grade.status != "no answer" for grade in grades)
    return ProblemResult(
        problem.benchmark,
        problem.id,
        problem.gold,
        samples=len(responses),
        correct=sum(grade.correct for grade in grades),
        majority=vote.right,
        voted=voted,
        voted_share=vote.share,
        dist_4g=distinct_ngrams([response.token_ids for response in responses]),
        tokens=sum(len(response.token_ids) for response in responses) / len(responses),
        truncated=sum(not response.finished for response in responses) / len(responses),
        no_answer=1 - answered / len(responses),
        stopped=sum(grade.status in ("too long", "timed out", "crashed") for grade in grades),
    )


def _figure(values: np.ndarray) -> dict[str, float | None]:
    known = values[~np.isnan(values)]
    low, high = interval(values, SEED)
    mean = float(known.mean()) if len(known) else math.nan
    return {
        key: None if math.isnan(value) else value
        for key, value in zip(("value", "low", "high"), (mean, low, high), strict=True)
    }
