"""From rollouts to what both models read.

With one tokenizer both read the student's ids; a teacher with privileged text reads another prompt before them. With two, the
teacher reads the prompt in its own chat template and the response's text in its own tokens, and only states after the same
byte are compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.cross_tokenizer.retokenize import Retokenized, Retokenizer
from oprd_megatron.errors import DataError
from oprd_megatron.representation.batch import Sample, TeacherText
from oprd_megatron.rollout.engine import Rollout
from oprd_megatron.rollout.prompts import Prompt


class SampleMaker:
    """Makes samples of a run.

    Args:
        prompts: whose responses they are.
        config: position anchor and the least share of aligned tokens.
        to_teacher: retokenises the student's responses; None with one tokenizer.
        to_student: retokenises the teacher's responses.
        teacher_context, student_context: tokens that each can read; what comes later is cut, and not aligned.

    Attributes:
        aligned_fraction: share of response tokens of the last `of_student` that are aligned; None with one tokenizer.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        config: DistillConfig,
        to_teacher: Retokenizer | None = None,
        to_student: Retokenizer | None = None,
        teacher_context: int = 0,
        student_context: int = 0,
    ) -> None:
        self.prompts = {prompt.index: prompt for prompt in prompts}
        self.config, self.to_teacher, self.to_student = config, to_teacher, to_student
        self.teacher_context, self.student_context = teacher_context, student_context
        self.aligned_fraction: float | None = None

    def of_student(self, rollouts: Sequence[Rollout]) -> list[Sample]:
        """Samples of the student's responses.

        Raises:
            DataError: fewer tokens are aligned than `min_aligned` asks for.
        """
        if self.to_teacher is None:
            read = [self.prompts[rollout.prompt_index].teacher_ids or None for rollout in rollouts]
            return [
                Sample(rollout.prompt_ids, rollout.response_ids, teacher_prompt_ids=ids)
                for rollout, ids in zip(rollouts, read, strict=True)
            ]
        samples, aligned, tokens = [], 0, 0
        for rollout in rollouts:
            both = self.to_teacher.response(rollout.response_ids)
            teacher_prompt = self.prompts[rollout.prompt_index].teacher_ids
            student, teacher = self._pairs(both)
            text = self._text(
                teacher_prompt, both.teacher_ids, rollout.prompt_ids, rollout.response_ids, student, teacher
            )
            samples.append(Sample(rollout.prompt_ids, rollout.response_ids, text))
            aligned, tokens = aligned + len(text.student_positions), tokens + len(rollout.response_ids)
        self.aligned_fraction = aligned / tokens
        if self.aligned_fraction < self.config.min_aligned:
            raise DataError(
                f"distill.min_aligned: only {self.aligned_fraction:.3f} of this batch's response tokens end where one of the "
                f"teacher's does, less than {self.config.min_aligned:g}; lower it, or look at the student's text"
            )
        return samples

    def of_teacher(self, rollouts: Sequence[Rollout]) -> list[Sample]:
        """Samples of the teacher's responses, which the student reads in its tokens."""
        if self.to_student is None:
            asked = [self.prompts[rollout.prompt_index] for rollout in rollouts]
            return [
                Sample(prompt.token_ids, rollout.response_ids, teacher_prompt_ids=prompt.teacher_ids or None)
                for rollout, prompt in zip(rollouts, asked, strict=True)
            ]
        samples = []
        for rollout in rollouts:
            both = self.to_student.response(rollout.response_ids)  # here the writer is the teacher
            prompt = self.prompts[rollout.prompt_index]
            teacher, student = self._pairs(both)
            response = both.teacher_ids[: max(0, self.student_context - len(prompt.token_ids))]
            text = self._text(rollout.prompt_ids, rollout.response_ids, prompt.token_ids, response, student, teacher)
            samples.append(Sample(prompt.token_ids, response, text))
        return samples

    def _pairs(self, both: Retokenized) -> tuple[np.ndarray, np.ndarray]:
        """Response indices of the states to compare: the writer's, the reader's."""
        if self.config.position_anchor == "token":
            return both.student_tokens, both.teacher_tokens
        return both.student_starts - 1, both.teacher_starts - 1

    def _text(
        self,
        teacher_prompt: tuple[int, ...],
        teacher_response: Sequence[int],
        student_prompt: tuple[int, ...],
        student_response: tuple[int, ...],
        student: np.ndarray,
        teacher: np.ndarray,
    ) -> TeacherText:
        ids = (teacher_prompt + tuple(teacher_response))[: self.teacher_context]
        student, teacher = student + len(student_prompt), teacher + len(teacher_prompt)
        there = (teacher < len(ids)) & (student < len(student_prompt) + len(student_response))
        there &= (teacher >= 0) & (student >= 0)
        return TeacherText(ids, tuple(student[there].tolist()), tuple(teacher[there].tolist()))
