"""The best monotone layer map for a matrix of scores, by dynamic programming.

Shapes: L_S student layers (rows), L_T teacher layers (columns). Layers are 1-based: row i is student layer i + 1.

A map gives each student layer a teacher layer, or None. It is monotone: a deeper student layer never gets an earlier
teacher layer. Its worth is the sum of its scores, where a layer without a teacher layer counts `floor`. Let best[i, j]
be the largest worth of rows i, i + 1, .. on columns j, j + 1, ..; then

    take[i, j] = scores[i, j] + best[i + 1, j + strict]
    best[i, j] = max(take[i, j], take[i, j + 1], .., floor + best[i + 1, j])

which is O(L_S L_T), because the running maximum from the right is kept. Teacher layers are skipped at no cost.
"""

from __future__ import annotations

import numpy as np

from oprd_megatron.errors import ConfigError, UserError


def best_monotone_map(scores: np.ndarray, *, strict: bool, floor: float | None) -> list[int | None]:
    """The monotone map with the largest sum of scores.

    Args:
        scores: [L_S, L_T], any float type; larger is better.
        strict: two student layers never share a teacher layer (increasing); else they may (non-decreasing).
        floor: what a student layer without a teacher layer counts, so that no pair below it is ever in the map; None
            gives every student layer a teacher layer.

    Returns:
        L_S entries: the 1-based teacher layer of student layer i + 1, or None. Among maps of equal worth the first in
        reading order: compared from student layer 1 on, a smaller teacher layer comes first and None comes last.

    Raises:
        UserError: an empty matrix, or a score that is not finite.
        ConfigError: a strict map of more student than teacher layers.
    """
    scores = np.asarray(scores, dtype=np.float64)
    _check(scores, strict)
    num_student_layers, num_teacher_layers = scores.shape
    unsupervised = -np.inf if floor is None else floor
    best = np.zeros((num_student_layers + 1, num_teacher_layers + 1))
    take = np.full((num_student_layers, num_teacher_layers + 1), -np.inf)  # the last column: no teacher layer is left
    for row in reversed(range(num_student_layers)):
        take[row, :-1] = scores[row] + (best[row + 1, 1:] if strict else best[row + 1, :-1])
        from_here = np.maximum.accumulate(take[row, ::-1])[::-1]
        best[row] = np.maximum(from_here, unsupervised + best[row + 1])
    return _read_off(best, take, strict)


def _read_off(best: np.ndarray, take: np.ndarray, strict: bool) -> list[int | None]:
    """The first best map in reading order; equality is exact, `best` holds the very numbers of `take`."""
    chosen: list[int | None] = []
    start = 0
    for row in range(len(take)):
        columns = np.flatnonzero(take[row, start:-1] == best[row, start])
        if len(columns) == 0:
            chosen.append(None)
            continue
        column = start + int(columns[0])
        chosen.append(column + 1)
        start = column + strict
    return chosen


def _check(scores: np.ndarray, strict: bool) -> None:
    if scores.ndim != 2 or scores.size == 0:
        raise UserError(
            f"layer scores: shape {scores.shape}; give student layers x teacher layers, at least one of each"
        )
    bad = np.argwhere(~np.isfinite(scores))
    if len(bad):
        row, column = bad[0]
        raise UserError(
            f"layer scores: student layer {row + 1} x teacher layer {column + 1} is {scores[row, column]}; "
            "look for states that are not finite, or score more rows"
        )
    if strict and scores.shape[0] > scores.shape[1]:
        raise ConfigError(
            f"distill.layer_map: {scores.shape[0]} student layers cannot each have a teacher layer of their own out of "
            f"{scores.shape[1]}; allow ties"
        )
