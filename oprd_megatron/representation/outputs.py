"""Which predictions of the models are compared, and what of the teacher's travels for them. Pure planning, no tensors.

Logits never travel. Either the teacher's final states do (d_T numbers a token) and meet its LM head on the student's last
stage; or the teacher's own last stage applies the head and sends the few numbers that the terms read (`summary_width`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from oprd_megatron.config.output import OutputConfig, Term, reads_few
from oprd_megatron.parallel.layout import GridLayout
from oprd_megatron.representation.batch import Sample
from oprd_megatron.representation.positions import some_of
from oprd_megatron.representation.wire import Wire


def supervised_tokens(term: Term, length: int) -> range:
    """Which of `length` response tokens (0-based) a term supervises."""
    return some_of(length, term.positions, term.first_or_last)


@dataclass(frozen=True)
class Supervised:
    """Response tokens of a sample that at least one term supervises."""

    terms: Sequence[Term]

    def __call__(self, sample: Sample) -> Sequence[int]:
        """0-based, ascending."""
        length = len(sample.response_ids)
        return sorted(set().union(*(supervised_tokens(term, length) for term in self.terms)))


def summary_width(terms: Sequence[Term]) -> int:
    """C: numbers of a token that terms read of the teacher's distribution, where these are few: for a sampled term log
    q(y_t), for a top-k term k ids and a number for each (`fused_terms.summarize`)."""
    whole = next((term.label for term in terms if not reads_few(term)), None)
    assert whole is None, f"the term {whole} reads the whole distribution"
    return sum(2 * term.k if term.kind == "topk" else 1 for term in terms)


def output_wire(terms: Sequence[Term], heads: Literal["student", "teacher"], dtype: str, width: int) -> Wire:
    """Format of what travels of a token.

    Args:
        terms: of the run.
        heads: where the teacher's head is applied.
        dtype, width: the teacher's; "fp32" or "bf16".
    """
    return Wire("fp32", summary_width(terms)) if heads == "teacher" else Wire(dtype, width)  # type: ignore[arg-type]


def heads_at(
    config: OutputConfig, teacher: GridLayout, student: GridLayout, dtype: str, width: int
) -> Literal["student", "teacher"]:
    """`teacher_head`, resolved: where fewer bytes travel. With equal layouts nothing does, and it is the student's side.

    Args:
        config: the terms.
        teacher, student: the grids.
        dtype, width: as in `output_wire`.
    """
    if config.teacher_head != "auto":
        return config.teacher_head
    axes = ("tp", "cp", "dp", "pp", "sp")
    alike = teacher.ranks == student.ranks and all(getattr(teacher, a) == getattr(student, a) for a in axes)
    if alike or not all(map(reads_few, config.terms)):
        return "student"
    sizes = {side: output_wire(config.terms, side, dtype, width).state_bytes for side in ("student", "teacher")}  # type: ignore[arg-type]
    return "teacher" if sizes["teacher"] < sizes["student"] else "student"
