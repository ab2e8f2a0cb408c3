"""What is said about a student's answers: pure functions of counts and texts, one number a problem.

Shapes: P problems; of problem i, n_i responses of which c_i are right.

    Avg@k        c / n, the accuracy of one response                                     `accuracy`
    Best@k       1 if c > 0                                                              `best`
    pass@j       1 - C(n - c, j) / C(n, j), the chance that one of j responses is right  `pass_at`  (Chen et al. 2021)
    majority@k   whether the answer given most often is right                            `majority`
    Dist-4g      different 4-grams / all 4-grams of a problem's responses                `distinct_ngrams`

A benchmark's figure is the mean over its problems.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def accuracy(correct: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """c / n, `[P]`; its mean is Avg@k.

    Args:
        correct, samples: [P] integers, 0 <= c <= n and n >= 1.
    """
    return correct / samples


def best(correct: np.ndarray) -> np.ndarray:
    """1.0 where any response is right, else 0.0, `[P]`; its mean is Best@k."""
    return (correct > 0).astype(float)


def pass_at(correct: np.ndarray, samples: np.ndarray, draws: int) -> np.ndarray:
    """Chance that `draws` of a problem's responses, drawn without putting back, have a right one, `[P]`.

    The unbiased estimator of pass@k (Chen et al., arXiv 2107.03374, Eq. 1), as the product of (1 - draws / i) for i from
    n - c + 1 to n, which has no large binomials. With draws = n it is Best@k, with draws = 1 Avg@k.

    Args:
        correct, samples: [P] integers.
        draws: from 1 to the smallest n.
    """
    assert 1 <= draws <= samples.min(), f"{draws} draws of {samples.min()} responses"
    fails = [
        1.0 if c == 0 else float(np.prod(np.maximum(0.0, 1.0 - draws / np.arange(n - c + 1, n + 1))))
        for c, n in zip(correct.tolist(), samples.tolist(), strict=True)
    ]
    return 1.0 - np.array(fails)


@dataclass(frozen=True)
class Vote:
    """How a problem's responses voted.

    Attributes:
        right: 1.0 if the answer given most often is right. If m answers share first place and the right one is among them, 1/m:
            the chance under a fair draw, which depends on no order.
        winner: first response with a winning answer; the right one where it shares first place; None if nobody answered.
        share: of all responses that gave the winning answer.
    """

    right: float
    winner: int | None
    share: float


def majority(groups: Sequence[int | None], correct: Sequence[bool]) -> Vote:
    """The vote of one problem's responses.

    Args:
        groups: each response's class of equal answers; None did not answer, and does not vote.
        correct: whether each is right; the same within a class.
    """
    votes = Counter(group for group in groups if group is not None)
    if not votes:
        return Vote(0.0, None, 0.0)
    most = max(votes.values())
    first = {group for group, count in votes.items() if count == most}
    right = {group for group, good in zip(groups, correct, strict=True) if good and group in first}
    shown = right or first
    winner = next(place for place, group in enumerate(groups) if group in shown)
    return Vote(len(right) / len(first), winner, most / len(groups))


def distinct_ngrams(responses: Sequence[Sequence[int]], size: int = 4) -> float:
    """Different n-grams over all n-grams of a problem's responses together, by token ids (the paper's Dist-4g); NaN if every
    response is shorter than `size`."""
    seen: set[tuple[int, ...]] = set()
    total = 0
    for response in responses:
        grams = list(zip(*(response[first:] for first in range(size)), strict=False))
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else float("nan")
