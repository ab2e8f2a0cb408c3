"""The answer of a response is its last complete box."""

from __future__ import annotations

import time

import pytest

from oprd_megatron.benchmarks.answers import answer_in, boxed_in


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} no, \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a \\ b}", r"a \\ b"),
        (r"\boxed{\left\{ x \right.} and {", r"\left\{ x \right."),
        (r"\boxed {7}", "7"),
        (r"\boxed 7.", "7"),
        (r"$\boxed7$", "7"),
        (r"\boxed{3} then \boxed{4 and no end", "3"),
        (r"} } \boxed{3} {", "3"),
        (r"{ \boxed{3}", "3"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"no box", None),
        (r"\boxed", None),
        (r"\boxed{", None),
    ],
)
def test_last_complete_box(text: str, boxed: str | None) -> None:
    """Nested and escaped braces, boxes without braces, boxes that never close."""
    assert boxed_in(text) == boxed


def test_without_a_box_the_end_is_read_or_nothing() -> None:
    """An empty box is no answer, even if text follows: the student chose to box nothing."""
    found = answer_in("it is 7", boxed_only=False)
    assert found is not None and found.text == "it is 7" and not found.boxed
    assert answer_in("it is 7", boxed_only=True) is None
    assert answer_in(r"\boxed{ } 7", boxed_only=False) is None
    assert answer_in("  ", boxed_only=False) is None


@pytest.mark.parametrize(
    "text", ["{" * 200_000, "\\boxed{" * 30_000, "}" * 200_000, "\\" * 200_001, "\\boxed" * 30_000]
)
def test_huge_texts_take_linear_time(text: str) -> None:
    """A megabyte of braces: seconds would mean a quadratic search (200,000^2 steps are hours)."""
    start = time.perf_counter()
    answer_in(text, boxed_only=False)
    assert time.perf_counter() - start < 5
