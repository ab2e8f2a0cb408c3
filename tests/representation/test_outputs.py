"""What of the teacher's outputs travels, and where its head is applied: planning alone, no tensors."""

from __future__ import annotations

from typing import Any

import pytest

from oprd_megatron.config.output import OutputConfig
from oprd_megatron.representation.batch import Sample
from oprd_megatron.representation.outputs import Supervised, heads_at, output_wire, summary_width, supervised_tokens
from oprd_megatron.representation.wire import Wire
from tests.grids import grid

SAMPLED = {"kind": "sampled"}
TEACHERS = {"kind": "topk", "k": 4, "support": "teacher", "name": "theirs"}
STUDENTS = {"kind": "topk", "k": 4}
FULL = {"kind": "full"}


def config(*terms: dict[str, Any], head: str = "auto") -> OutputConfig:
    return OutputConfig.model_validate({"terms": list(terms), "teacher_head": head})


@pytest.mark.parametrize(
    ("keys", "by_length"),
    [
        # which of 0, 1, 3 and 6 response tokens
        ({"positions": "all"}, ([], [0], [0, 1, 2], [0, 1, 2, 3, 4, 5])),
        ({"positions": "last"}, ([], [0], [2], [5])),
        ({"positions": "last_k", "first_or_last": 2}, ([], [0], [1, 2], [4, 5])),
        ({"positions": "first_k", "first_or_last": 2}, ([], [0], [0, 1], [0, 1])),
        ({"positions": "last_k"}, ([], [0], [0, 1, 2], [0, 1, 2, 3, 4, 5])),
    ],
)
def test_supervised_tokens(keys: dict[str, Any], by_length: tuple[list[int], ...]) -> None:
    """As for states: 0-based, never more than there are."""
    (term,) = config({**FULL, **keys}).terms
    assert tuple(list(supervised_tokens(term, length)) for length in (0, 1, 3, 6)) == by_length


def test_each_token_is_predicted_once() -> None:
    """The union of what the terms supervise, ascending; overlapping and separate."""
    first, last, some = (
        {**FULL, "name": name, "positions": positions, "first_or_last": k}
        for name, positions, k in (("a", "first_k", 2), ("b", "last", 1), ("c", "last_k", 5))
    )
    sample = Sample((1, 2), (0,) * 6)
    assert Supervised(config(first, last).terms)(sample) == [0, 1, 5]
    assert Supervised(config(some, first, last).terms)(sample) == [0, 1, 2, 3, 4, 5]
    assert Supervised(config(first).terms)(Sample((1,), ())) == []


def test_numbers_of_a_token() -> None:
    """log q(y_t) is one number; k ids with a number each are 2 k; a term that reads all of it has no number."""
    sampled, teachers, students = ([term] for term in config(SAMPLED, TEACHERS, STUDENTS).terms)
    assert (summary_width(sampled), summary_width(teachers), summary_width(sampled + teachers)) == (1, 8, 9)
    with pytest.raises(AssertionError, match="topk reads the whole"):
        summary_width(sampled + students)
    terms = config(SAMPLED, TEACHERS).terms
    assert output_wire(terms, "teacher", "bf16", 64) == Wire("fp32", 9)
    assert output_wire(terms, "student", "bf16", 64) == Wire("bf16", 64)
    assert output_wire(terms, "student", "fp32", 64).state_bytes == 256


ONE, APART = grid(1, 1, 1, (4,)), grid(1, 1, 1, (4,), at=1)


@pytest.mark.parametrize(
    ("terms", "dtype", "width", "expected"),
    [
        # a state's bytes against 4 bytes a number
        ([SAMPLED], "bf16", 3, "teacher"),
        ([SAMPLED], "bf16", 2, "student"),
        ([SAMPLED], "fp32", 2, "teacher"),
        ([SAMPLED, TEACHERS], "bf16", 19, "teacher"),
        ([SAMPLED, TEACHERS], "bf16", 18, "student"),
        ([SAMPLED, TEACHERS], "fp32", 10, "teacher"),
        ([SAMPLED, TEACHERS], "fp32", 9, "student"),
        ([STUDENTS], "fp32", 10_000, "student"),
        ([SAMPLED, FULL], "fp32", 10_000, "student"),
    ],
)
def test_auto_is_where_fewer_bytes_travel(terms: list[dict[str, Any]], dtype: str, width: int, expected: str) -> None:
    """Few numbers where all terms read few and they are fewer than a state; a state otherwise, also where it is a draw."""
    assert heads_at(config(*terms), ONE, APART, dtype, width) == expected


def test_nothing_travels_between_equal_layouts() -> None:
    """There the student's side is chosen; layers may be cut differently. What is set is kept."""
    for layout in (ONE, grid(2, 2, 1, (1, 3), sp=True), grid(1, 1, 2, (4,), cp=2)):
        assert heads_at(config(SAMPLED), layout, layout, "fp32", 64) == "student"
        assert heads_at(config(SAMPLED, head="teacher"), layout, layout, "fp32", 64) == "teacher"
    assert heads_at(config(SAMPLED), grid(1, 2, 1, (1, 3)), grid(1, 2, 1, (2, 2)), "fp32", 64) == "student"
    for other in (grid(2, 1, 1, (4,)), grid(1, 2, 1, (2, 2)), grid(1, 1, 2, (4,)), grid(1, 1, 1, (4,), cp=2)):
        assert heads_at(config(SAMPLED), other, grid(1, 1, 1, (4,)), "fp32", 64) == "teacher"
        assert heads_at(config(SAMPLED, head="student"), other, ONE, "fp32", 64) == "student"
