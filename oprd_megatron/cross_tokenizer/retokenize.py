"""A student's response, retokenised for a teacher that has another tokenizer, with the positions at which both agree.

The student writes tokens; their bytes are the text; the teacher reads the text in tokens of its own. The two states after
the same byte have read the same, so they can be compared (docs/method.md); states in between cannot.

Special tokens go by rule. A response that ends with one of the student's end tokens gets the teacher's, and these two are
a pair; for `align` they are one byte past the text. Every other special token of the student is not given to the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from oprd_megatron.cross_tokenizer.align import UNKNOWN, align_ends, start_boundaries
from oprd_megatron.cross_tokenizer.reader import Reader
from oprd_megatron.cross_tokenizer.response_text import readable_text
from oprd_megatron.cross_tokenizer.token_bytes import TokenBytes
from oprd_megatron.errors import DataError


@dataclass(frozen=True, eq=False)
class Retokenized:
    """One response in both tokenisations.

    Attributes:
        teacher_ids: The teacher's M tokens of the response, its end token included if the response ended.
        num_student_tokens: N, the student's.
        student_tokens: [A] int64 indices into the student's response, ascending.
        teacher_tokens: [A] indices into `teacher_ids`: each ends at the byte where its partner does.
        student_starts: [B] int64 indices into the student's response, ascending.
        teacher_starts: [B] indices into `teacher_ids`: each starts at the byte where its partner does; the states that
            predict them are one position earlier.
    """

    teacher_ids: tuple[int, ...]
    num_student_tokens: int
    student_tokens: np.ndarray
    teacher_tokens: np.ndarray
    student_starts: np.ndarray
    teacher_starts: np.ndarray

    def aligned_fraction(self) -> float:
        """Aligned tokens out of the student's; 1 for an empty response, of which nothing is missing."""
        return len(self.student_tokens) / self.num_student_tokens if self.num_student_tokens else 1.0


class Retokenizer:
    """Retokenises responses of one student for one teacher.

    Args:
        student: The student's tokenizer, a fast one.
        teacher: The teacher's, likewise.
        student_end_ids: Ids that end the student's response (end of turn, end of text).
        teacher_end_id: Id that ends the teacher's (see `teacher_end_id`).

    Raises:
        DataError: a tokenizer that cannot be followed through a text.
    """

    def __init__(
        self,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        student_end_ids: Sequence[int],
        teacher_end_id: int,
    ) -> None:
        self._student = TokenBytes(student)
        self._teacher = Reader(teacher)
        self._student_end_ids = frozenset(student_end_ids)
        self._teacher_end_id = teacher_end_id

    def response(self, ids: Sequence[int]) -> Retokenized:
        """Retokenise one response.

        Args:
            ids: The student's tokens after the prompt, N of them; any ids in any order, ended or cut anywhere.
        """
        ended = len(ids) > 0 and ids[-1] in self._student_end_ids
        body = ids[:-1] if ended else ids
        data = b"".join(self._student.of(token_id) for token_id in body)
        text, place_of = readable_text(data)
        teacher_ids, text_ends = self._teacher.read(text)
        student_ends = self._student.ends(body)
        teacher_ends = np.where(text_ends == UNKNOWN, UNKNOWN, place_of[text_ends])
        if ended:
            teacher_ids += (self._teacher_end_id,)
            student_ends, teacher_ends = (np.append(ends, len(data) + 1) for ends in (student_ends, teacher_ends))
        student_tokens, teacher_tokens = align_ends(student_ends, teacher_ends)
        student_starts, teacher_starts = start_boundaries(student_ends, teacher_ends)
        return Retokenized(teacher_ids, len(ids), student_tokens, teacher_tokens, student_starts, teacher_starts)


def check_shared_boundaries(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, texts: Sequence[str], floor: float = 0.0
) -> float:
    """Refuse two tokenizers that cut texts with too little in common.

    Args:
        student: The student's tokenizer.
        teacher: The teacher's.
        texts: Samples of what the student writes; some of more than one word.
        floor: Least mean share of the student's tokens that must be aligned.

    Returns:
        That share: the mean over texts of `Retokenized.aligned_fraction`.

    Raises:
        DataError: no text has a shared boundary before its end, the share is below `floor`, or there are no texts.
    """
    if not texts:
        raise DataError("no texts to compare the student's and the teacher's tokenizers on; give at least one")
    retokenizer = Retokenizer(student, teacher, (), 0)
    fractions, shared = [], 0
    for text in texts:
        ids = student(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        result = retokenizer.response(ids)
        fractions.append(result.aligned_fraction())
        shared += int((result.student_tokens < len(ids) - 1).sum())
    fraction = float(np.mean(fractions))
    if not shared:
        raise DataError(
            f"the student's and the teacher's tokenizers share no boundary inside any of {len(texts)} texts; "
            "choose a teacher whose tokenizer keeps spaces and letters as they are"
        )
    if fraction < floor:
        raise DataError(
            f"only {fraction:.3f} of the student's tokens end where one of the teacher's does ({len(texts)} texts), less "
            f"than the floor of {floor:g}; lower the floor or choose a teacher with a closer tokenizer"
        )
    return fraction
