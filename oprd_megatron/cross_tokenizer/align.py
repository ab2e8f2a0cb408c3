"""Which tokens of two tokenisations of one text meet at a byte. Pure functions of byte offsets; the convention is here.

Legend: N tokens of the student, M of the teacher, A pairs. `ends[i]` is how many bytes of the text have been read after
token i; a token starts where the one before it ends, the first at byte 0. UNKNOWN marks an end that nothing proves.

- Ends (`token` anchor): of tokens that end at one byte, the first counts; it is the one that reached it. Byte 0 is no end.
- Starts (`predictor` anchor): of tokens that start at one byte, the last counts; it is the one with bytes to predict.
"""

from __future__ import annotations

import numpy as np

UNKNOWN = -1
"""A token's byte end that cannot be proven; such a token is never aligned by it."""


def align_ends(student_ends: np.ndarray, teacher_ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every pair (i, j) of tokens that end at the same byte.

    Args:
        student_ends: [N] int64 byte ends, not decreasing but for UNKNOWN.
        teacher_ends: [M] likewise.

    Returns:
        i [A] and j [A], int64, both strictly increasing.
    """
    (student_bytes, student_tokens), (teacher_bytes, teacher_tokens) = map(_first_ends, (student_ends, teacher_ends))
    _, at_student, at_teacher = np.intersect1d(student_bytes, teacher_bytes, assume_unique=True, return_indices=True)
    return student_tokens[at_student], teacher_tokens[at_teacher]


def start_boundaries(student_ends: np.ndarray, teacher_ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every pair (i, j) of tokens that start at the same byte, byte 0 included.

    The states that predict them are one position earlier in either sequence; for token 0 that is the prompt's last.

    Args:
        student_ends: [N] int64 byte ends, not decreasing but for UNKNOWN.
        teacher_ends: [M] likewise.

    Returns:
        i [A] and j [A], int64, both strictly increasing.
    """
    (student_bytes, student_tokens), (teacher_bytes, teacher_tokens) = map(_last_starts, (student_ends, teacher_ends))
    _, at_student, at_teacher = np.intersect1d(student_bytes, teacher_bytes, assume_unique=True, return_indices=True)
    return student_tokens[at_student], teacher_tokens[at_teacher]


def _first_ends(ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct known ends above 0, ascending, and the first token at each."""
    known = np.flatnonzero(ends > 0)
    values, first = np.unique(ends[known], return_index=True)
    return values, known[first]


def _last_starts(ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct known starts, ascending, and the last token at each."""
    starts = np.concatenate([np.zeros(min(1, len(ends)), dtype=np.int64), ends[:-1]])
    known = np.flatnonzero(starts != UNKNOWN)[::-1]
    values, last = np.unique(starts[known], return_index=True)
    return values, known[last]
