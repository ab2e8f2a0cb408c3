"""Hard responses one by one: what the teacher reads, and which tokens meet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from oprd_megatron.cross_tokenizer import Retokenized, Retokenizer, TokenBytes, check_shared_boundaries
from oprd_megatron.errors import DataError
from tests.cross_tokenizer.small_tokenizers import gemma_like, llama_like, qwen_like, small_tokenizer
from tests.tiny_models import EOS_ID, tiny_tokenizer

FIRST_BYTE = 4
"""Id of the tiny tokenizer's first letter; its tokens are single bytes."""


def as_bytes(data: bytes) -> list[int]:
    """Ids of the tiny tokenizer for any bytes."""
    letters = {TokenBytes(tiny_tokenizer()).of(token_id): token_id for token_id in range(FIRST_BYTE, FIRST_BYTE + 256)}
    return [letters[bytes([byte])] for byte in data]


def retokenized(teacher: str | PreTrainedTokenizerBase, ids: Sequence[int]) -> Retokenized:
    """A response of the tiny one-byte tokenizer for one of the small ones, which ends its turns with id 999."""
    teacher = small_tokenizer(teacher) if isinstance(teacher, str) else teacher
    return Retokenizer(tiny_tokenizer(), teacher, [EOS_ID], 999).response(ids)


def ends(teacher: str | PreTrainedTokenizerBase, data: bytes) -> dict[str, int]:
    """The teacher's aligned tokens by position and name, and the byte at which the student ends with each."""
    tokenizer = small_tokenizer(teacher) if isinstance(teacher, str) else teacher
    result = retokenized(tokenizer, as_bytes(data))
    names = [f"{j} {tokenizer.convert_ids_to_tokens(result.teacher_ids[j])}" for j in result.teacher_tokens]
    return dict(zip(names, (result.student_tokens + 1).tolist(), strict=True))


def test_empty_responses() -> None:
    """No tokens; only an end token; only special tokens."""
    empty = retokenized("gemma_like", [])
    assert empty.teacher_ids == () and len(empty.student_tokens) == len(empty.student_starts) == 0
    assert empty.aligned_fraction() == 1.0
    only_end = retokenized("llama_like", [EOS_ID])
    assert only_end.teacher_ids == (999,) and only_end.aligned_fraction() == 1.0
    assert [each.tolist() for each in (only_end.student_tokens, only_end.teacher_tokens)] == [[0], [0]]
    assert [each.tolist() for each in (only_end.student_starts, only_end.teacher_starts)] == [[0], [0]]
    special = retokenized("gemma_like", [0, 1, 0])
    assert special.teacher_ids == () and special.aligned_fraction() == 0.0


def test_the_end_token_is_the_last_pair() -> None:
    """Only where the response ends with one; one in the middle is a special token like others and has no text."""
    result = retokenized("gemma_like", [*as_bytes(b"a"), EOS_ID, *as_bytes(b"b"), 1, EOS_ID])
    teacher = small_tokenizer("gemma_like")
    assert result.teacher_ids == (*teacher("ab", add_special_tokens=False)["input_ids"], 999)
    assert result.student_tokens[-1] == 4 and result.teacher_tokens[-1] == len(result.teacher_ids) - 1
    assert {1, 3}.isdisjoint(result.student_tokens.tolist())
    assert result.student_starts[-1] == 4 and result.teacher_starts[-1] == len(result.teacher_ids) - 1
    cut = retokenized("gemma_like", [*as_bytes(b"ab"), 0])
    assert cut.teacher_ids == result.teacher_ids[:-1] and cut.student_tokens[-1] == 1


def test_a_cut_character_is_not_read() -> None:
    """The teacher reads whole characters; the end tokens are a pair even so, but do not start at one byte."""
    whole, cut = "ab日".encode(), "ab日本".encode()[:-1]
    for response in (as_bytes(cut), [*as_bytes(cut), EOS_ID]):
        result = retokenized("unigram_bytes", response)
        plain = retokenized("unigram_bytes", as_bytes(whole))
        assert result.teacher_ids[: len(plain.teacher_ids)] == plain.teacher_ids
        kept = plain.student_tokens.tolist()
        assert result.student_tokens.tolist() == kept + ([len(cut)] if len(response) > len(cut) else [])
        assert len(cut) not in result.student_starts


def test_invalid_bytes_are_read_as_replacement_characters() -> None:
    """Nothing meets inside the U+FFFD; what follows meets at the bytes that the student wrote."""
    found = ends("byte_level", b"the \xe2\x96 cat\xff\xff.")
    read = retokenized("byte_level", as_bytes(b"a\xe2\x96b\xff")).teacher_ids
    teacher = TokenBytes(small_tokenizer("byte_level"))
    assert b"".join(map(teacher.of, read)).decode() == "a\ufffdb\ufffd"
    assert 5 not in found.values() and {4, 6, 10, 11, 12, 13} <= set(found.values())
    assert list(ends(tiny_tokenizer(), "\ufffd".encode()).values()) == [1, 2, 3]  # a written one has bytes of its own
    assert list(ends(tiny_tokenizer(), b"\xe2\x96a").values()) == [2, 3]


@pytest.mark.parametrize(("text", "first_end"), [("e\u0301a", 3), ("e\u0323\u0301a", 3), ("\u1112\u1161\u11aba", 9)])
def test_composed_characters_end_where_their_marks_do(text: str, first_end: int) -> None:
    """Qwen's tokenizers compose; the library says that the composed character ends before its marks."""
    byte_by_byte = tiny_tokenizer()
    byte_by_byte.backend_tokenizer.normalizer = qwen_like().backend_tokenizer.normalizer
    found = list(ends(byte_by_byte, text.encode()).values())
    assert found[0] == first_end and found[-1] == len(text.encode())


def test_marks_in_another_order_meet_after_the_last() -> None:
    """Acute then dot below is composed as dot below, acute left: no place in between is the same text."""
    byte_by_byte = tiny_tokenizer()
    byte_by_byte.backend_tokenizer.normalizer = qwen_like().backend_tokenizer.normalizer
    assert list(ends(byte_by_byte, "e\u0301\u0323".encode()).values()) == [5]


def test_dummy_spaces_have_no_bytes() -> None:
    """A leading "▁" that is not in the text is never aligned; what follows it starts at byte 0."""
    result = retokenized("unigram", as_bytes("日".encode()))
    assert small_tokenizer("unigram").convert_ids_to_tokens(list(result.teacher_ids)) == ["▁", "日"]
    assert result.student_tokens.tolist() == [2] and result.teacher_tokens.tolist() == [1]
    assert result.student_starts.tolist() == [0] and result.teacher_starts.tolist() == [1]
    assert "0 ▁the" in ends("unigram", b"the cat") and ends("unigram", b" the cat")["0 ▁the"] == 4


def test_dummy_spaces_after_added_tokens() -> None:
    """Each stretch of text between added tokens gets a dummy space of its own."""
    teacher = llama_like()
    teacher.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    result = retokenized(teacher, as_bytes("a<think>ж".encode()))
    assert result.student_tokens[-1] == 9 and 7 in result.student_tokens
    starts = dict(zip(result.student_starts.tolist(), result.teacher_starts.tolist(), strict=True))
    assert teacher.convert_ids_to_tokens(result.teacher_ids[starts[8] - 1]) in ("▁", "<think>")


def test_written_spaces_and_written_underlines() -> None:
    """Gemma's script writes a space as "▁"; a "▁" in the text has three bytes, a space one."""
    byte_by_byte = gemma_like(0)
    assert list(ends(byte_by_byte, "a ▁b".encode()).values()) == [1, 2, 5, 6]
    assert 8 in ends(byte_by_byte, "a ▁▁b".encode()).values()


@pytest.mark.parametrize("kind", ["byte_level", "qwen_like", "gemma_like", "llama_like", "unigram", "unigram_bytes"])
def test_control_tokens_in_the_text_are_text(kind: str) -> None:
    """What looks like one of the teacher's special tokens is read letter by letter, and aligned."""
    teacher = small_tokenizer(kind)
    for token_id in teacher.all_special_ids:
        text = f"the {teacher.convert_ids_to_tokens(token_id)} cat"
        result = retokenized(kind, as_bytes(text.encode()))
        assert token_id == teacher.unk_token_id or token_id not in result.teacher_ids
        assert len(text) - 1 in result.student_tokens and len(result.student_tokens) > 4


def test_byte_pieces_in_the_text_are_text() -> None:
    """Unigram would find its byte piece <0x41> in the text "<0x41>"."""
    found = ends("unigram_bytes", b"the <0x41> cat")
    assert not any("<0x41>" in name for name in found) and {5, 6, 7, 8, 9, 10, 14} <= set(found.values())


def test_unknown_characters_are_not_aligned() -> None:
    """An unknown token hides what it stands for; text after it is aligned again."""
    found = ends("unigram", "the жжж cat".encode())
    assert not any("<unk>" in name for name in found)
    assert 3 in found.values() and 14 in found.values() and not {6, 8, 10} & set(found.values())


def test_dropped_characters_prove_nothing() -> None:
    """Where a normaliser drops an accent, the letter's end could be before or after it."""
    dropping = tiny_tokenizer()
    dropping.backend_tokenizer.normalizer = small_tokenizer("no_accents").backend_tokenizer.normalizer
    assert list(ends(dropping, "ae\u0301b".encode()).values()) == [1, 5]
    lowering = tiny_tokenizer()
    lowering.backend_tokenizer.normalizer = small_tokenizer("lowercase").backend_tokenizer.normalizer
    assert list(ends(lowering, "aBİc".encode()).values()) == [1, 2, 4, 5]


def test_rewritings_that_depend_on_neighbours_prove_nothing() -> None:
    """Runs of spaces made one: the text's pieces, rewritten one by one, are not what the teacher read."""
    collapsing = tiny_tokenizer()
    collapsing.backend_tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    assert list(ends(collapsing, b"a b c").values()) == [1, 2, 3, 4, 5]
    assert ends(collapsing, b"a  b c") == {}


def test_added_tokens_have_the_bytes_that_they_say() -> None:
    """An added token is text, even where its characters are letters of the byte-level alphabet."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in ("éé", "a b")])
    tokens = TokenBytes(tokenizer)
    added = [tokens.of(token_id) for token_id in range(len(tokenizer) - 2, len(tokenizer))]
    assert added == ["éé".encode(), b"a b"]
    assert list(ends(tokenizer, "xééa b".encode()).values()) == [1, 5, 8]


def test_tokenizers_that_cannot_be_followed_are_refused() -> None:
    """Without spaces a token has no place in a text; the message is one line."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(DataError, match="drops spaces or digits") as caught:
        TokenBytes(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]"))
    assert "\n" not in str(caught.value)


def test_shared_boundaries_are_checked() -> None:
    """The share is the mean over texts; one below the floor, only the end shared, or no texts is one line."""
    texts = ["The cat sat on the mat", "def add(a, b):\n    return a + b"]
    student, teacher = small_tokenizer("byte_level"), small_tokenizer("gemma_like")
    retokenizer = Retokenizer(student, teacher, (), 0)
    fractions = [retokenizer.response(student(text)["input_ids"]).aligned_fraction() for text in texts]
    assert check_shared_boundaries(student, teacher, texts) == pytest.approx(np.mean(fractions))
    assert 0.1 < np.mean(fractions) < 1.0
    assert check_shared_boundaries(student, student, texts, floor=1.0) == 1.0
    for floor, samples, message in [
        (0.999, texts, "less than the floor of 0.999"),
        (0.0, ["a", "b", ""], "no boundary inside any of 3 texts"),
        (0.0, [], "no texts"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            check_shared_boundaries(student, teacher, samples, floor)
        assert "\n" not in str(caught.value)
