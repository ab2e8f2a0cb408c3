"""For any response and any two tokenizers, the aligned pairs are those that the meaning of alignment gives."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd_megatron.cross_tokenizer import Retokenizer, TokenBytes, align_ends, start_boundaries
from tests.cross_tokenizer.slow_reference import LEAD, reference, spell, student_bytes, text_of, view
from tests.cross_tokenizer.small_tokenizers import KINDS, small_tokenizer

PIECES = [
    *("the", " cats", "naïve", " ", "  ", "   ", "\n", "\n\n", "\t", "12", "\\frac{1}{2}", "x_i", "a = b"),
    *(
        "e\u0301",
        "e\u0323\u0301",
        "e\u0301\u0323",
        "\u0301",
        "\u1112\u1161\u11ab",
        "한",
        "日本",
        "中文字",
        "привет",
        "İ",
        "ﬁ",
    ),
    *(
        "👨‍👩‍👧",
        "👍🏽",
        "🇫🇷",
        "🙂",
        "▁",
        "▁▁",
        " ▁",
        "<eos>",
        "</s>",
        "<|im_end|>",
        "<think>",
        "\ufffd",
        "\u200d",
        "\x00",
    ),
]
TEXTS = st.one_of(st.lists(st.sampled_from(PIECES), max_size=9).map("".join), st.text(max_size=12))
PAIRS = st.tuples(st.sampled_from(sorted(KINDS)), st.sampled_from(sorted(KINDS)))
END, TEACHER_END = 7_000_001, 7_000_002
"""Ids that no tokenizer has: an end token is known by its id alone."""


def assert_is_reference(student_kind: str, teacher_kind: str, body: list[int], ended: bool) -> None:
    """Check one response: the teacher's tokens, and both lists of pairs."""
    student, teacher = small_tokenizer(student_kind), small_tokenizer(teacher_kind)
    response = [*body, END] if ended else body
    result = Retokenizer(student, teacher, [END], TEACHER_END).response(response)
    assert (result.teacher_ids[-1:] == (TEACHER_END,)) == ended
    teacher_ids = result.teacher_ids[: len(result.teacher_ids) - ended]
    text = text_of(b"".join(student_bytes(student_kind, student, token_id) for token_id in body))
    assert not set(teacher_ids) & (set(teacher.all_special_ids) - {teacher.unk_token_id})
    spelled = b"".join(spell(teacher_kind, teacher, token_id) for token_id in teacher_ids)
    if "</s>" not in text or not teacher_kind.startswith("unigram"):
        assert spelled == view(teacher_kind, teacher, text)

    ends, starts = reference(student_kind, student, teacher_kind, teacher, body, teacher_ids, ended)
    found = list(zip(result.student_tokens.tolist(), result.teacher_tokens.tolist(), strict=True))
    assert found == ends
    found_starts = list(zip(result.student_starts.tolist(), result.teacher_starts.tolist(), strict=True))
    assert found_starts == starts
    assert result.num_student_tokens == len(response)
    for pairs in (found, found_starts):
        assert all(before[0] < after[0] and before[1] < after[1] for before, after in pairwise(pairs))


@settings(max_examples=250, deadline=None)
@given(TEXTS, PAIRS, st.booleans())
def test_canonical_responses(text: str, pair: tuple[str, str], ended: bool) -> None:
    """A text as the student's tokenizer cuts it."""
    student = small_tokenizer(pair[0])
    assert_is_reference(*pair, student(text, add_special_tokens=False)["input_ids"], ended)


@settings(max_examples=250, deadline=None)
@given(st.data(), TEXTS, PAIRS, st.booleans())
def test_responses_cut_anywhere_from_any_tokens(
    data: st.DataObject, text: str, pair: tuple[str, str], ended: bool
) -> None:
    """Canonical and random ids mixed: half characters, invalid UTF-8, special tokens and ids without a token."""
    student = small_tokenizer(pair[0])
    canonical = student(text, add_special_tokens=False)["input_ids"]
    first = data.draw(st.integers(0, len(canonical)))
    last = data.draw(st.integers(first, len(canonical)))
    some = data.draw(st.lists(st.integers(0, len(student) - 1), max_size=5))
    assert_is_reference(*pair, [*canonical[:first], *some, *canonical[first:last]], ended)


@pytest.mark.parametrize("teacher_kind", sorted(KINDS))
@pytest.mark.parametrize("student_kind", sorted(KINDS))
def test_every_pair_of_tokenizers(student_kind: str, teacher_kind: str) -> None:
    """Each pair reads every hard piece of text, between plain words and by itself."""
    student = small_tokenizer(student_kind)
    for piece in PIECES:
        for text in (piece, f"The cat{piece}sat on"):
            assert_is_reference(student_kind, teacher_kind, student(text, add_special_tokens=False)["input_ids"], False)


ENDS = st.lists(st.integers(0, 3), max_size=12).map(lambda lengths: np.cumsum(lengths, dtype=np.int64))


@settings(max_examples=300, deadline=None)
@given(ENDS, ENDS, st.sets(st.integers(0, 11)))
def test_pairs_of_offsets_are_all_that_exist(student: np.ndarray, teacher: np.ndarray, unknown: set[int]) -> None:
    """Ends: the token that reaches a byte. Starts: the token that goes on from it. Unknown ends meet nothing."""
    hidden = [index in unknown for index in range(len(teacher))]
    shown = np.where(np.array(hidden, dtype=bool), -1, teacher)
    ends, starts = [], []
    for byte in range(1, 40):
        i = [index for index, end in enumerate(student) if end == byte]
        j = [index for index, end in enumerate(shown) if end == byte]
        ends += [(i[0], j[0])] if i and j else []
    for byte in range(40):
        i = [index for index in range(len(student)) if ([0, *student][index]) == byte]
        j = [index for index in range(len(shown)) if ([0, *shown][index]) == byte]
        starts += [(i[-1], j[-1])] if i and j else []
    for expected, found in [(ends, align_ends(student, shown)), (starts, start_boundaries(student, shown))]:
        assert list(zip(*(each.tolist() for each in found), strict=True)) == expected
        assert all(each.dtype == np.int64 for each in found)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_bytes_of_every_token(kind: str) -> None:
    """Every id of a vocabulary has the bytes that its kind says; ends are their running sum."""
    tokenizer = small_tokenizer(kind)
    tokens, ids = TokenBytes(tokenizer), list(range(len(tokenizer)))
    shares = [student_bytes(kind, tokenizer, token_id) for token_id in ids]
    assert [tokens.of(token_id) for token_id in ids] == shares
    assert tokens.ends(ids).tolist() == np.cumsum([len(share) for share in shares]).tolist()
    assert tokens.of(len(tokenizer) + 5) == b""
    assert tokens.script.lead.encode() == LEAD.get(kind, b"")
