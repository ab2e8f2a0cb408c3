"""Alignment found the slow way, from its meaning: a teacher's token ends at a place of the text if what the tokenizer makes
of the text up to there is what the tokens up to it spell. Shares no code with the package; quadratic and worse."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

BYTE_LEVEL = ("byte_level", "qwen_like", "lowercase", "no_accents")
LEAD = {"llama_like": "▁".encode(), "unigram": "▁".encode(), "unigram_bytes": "▁".encode()}
UNKNOWN_TOKEN = b"\xff"


def _letters() -> dict[str, int]:
    """What the library itself writes for each byte of UTF-8; bytes that UTF-8 never has stand for themselves."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = {chr(byte): byte for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}
    for code in [*range(0x800), *range(0x800, 0xD800, 64), *range(0xE000, 0x110000, 64)]:
        written = splitter.pre_tokenize_str(chr(code))[0][0]
        letters |= dict(zip(written, chr(code).encode(), strict=True))
    return letters


LETTERS = _letters()


def spell(kind: str, tokenizer: PreTrainedTokenizerFast, token_id: int) -> bytes:
    """A token as its vocabulary spells it; special tokens are spelled out."""
    token = str(tokenizer.convert_ids_to_tokens(token_id))
    if token == "<unk>":
        return UNKNOWN_TOKEN
    if token_id in tokenizer.added_tokens_decoder:
        return token.encode()
    if kind in BYTE_LEVEL:
        return bytes(LETTERS[letter] for letter in token)
    return bytes.fromhex(token[3:5]) if token.startswith("<0x") else token.encode()


def student_bytes(kind: str, tokenizer: PreTrainedTokenizerFast, token_id: int) -> bytes:
    """A token's share of the text."""
    if token_id in tokenizer.all_special_ids:
        return b""
    spelled = spell(kind, tokenizer, token_id)
    return spelled if kind in BYTE_LEVEL else spelled.replace("▁".encode(), b" ") if len(spelled) > 1 else spelled


def characters(data: bytes) -> list[tuple[str, int, int]]:
    """(character, first byte, one past the last) of what can be read; U+FFFD for a longest invalid beginning."""
    found, first = [], 0
    while first < len(data):
        length, character = 1, "\ufffd"
        for tried in range(1, min(4, len(data) - first) + 1):
            try:
                decoded = codecs.getincrementaldecoder("utf-8")().decode(data[first : first + tried])
            except UnicodeDecodeError:
                break
            length, character = tried, decoded
            if decoded:
                break
        if character == "" and first + length == len(data):
            break
        found.append((character or "\ufffd", first, first + length))
        first += length
    return found


def view(kind: str, tokenizer: PreTrainedTokenizerFast, text: str) -> bytes:
    """What the tokenizer makes of a text."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return b"".join(spell(kind, tokenizer, token_id) for token_id in ids)


def places(kind: str, tokenizer: PreTrainedTokenizerFast, data: bytes) -> dict[bytes, int]:
    """Every rewriting of a beginning of the text, and the byte of `data` where that beginning ends, if there is just one."""
    found: dict[bytes, set[int]] = {}
    read, text = characters(data), ""
    seen = view(kind, tokenizer, text)
    found.setdefault(seen, set()).add(0)
    for character, first, last in read:
        text += character
        before, seen = seen, view(kind, tokenizer, text)
        found.setdefault(seen, set()).add(last)
        raw = data[first:last]
        for byte in range(1, len(raw)):
            lead = b"" if before else LEAD.get(kind, b"")
            if character.encode() == raw and seen in (before + raw, lead + raw):
                found.setdefault(seen[: len(seen) - len(raw) + byte], set()).add(first + byte)
    return {spelled: min(where) for spelled, where in found.items() if len(where) == 1}


def text_of(data: bytes) -> str:
    """What the teacher is to read."""
    return "".join(character for character, _, _ in characters(data))


def reference(
    student_kind: str,
    student: PreTrainedTokenizerFast,
    teacher_kind: str,
    teacher: PreTrainedTokenizerFast,
    body: Sequence[int],
    teacher_ids: Sequence[int],
    ended: bool,
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pairs of tokens that end together, and pairs that start together; neither `body` nor `teacher_ids` has the end token,
    which is one byte past the text in both if the response `ended`."""
    shares = [student_bytes(student_kind, student, token_id) for token_id in body]
    where = places(teacher_kind, teacher, b"".join(shares))
    student_ends = [len(b"".join(shares[: index + 1])) for index in range(len(body))]
    spelled, teacher_ends = b"", []
    for token_id in teacher_ids:
        spelled += spell(teacher_kind, teacher, token_id)
        unknown = token_id == teacher.unk_token_id
        end = where.get(spelled, 0 if spelled == LEAD.get(teacher_kind) else None)
        teacher_ends.append(None if unknown else end)
    if ended:
        shares.append(b"!")
        student_ends.append(len(b"".join(shares)))
        teacher_ends.append(student_ends[-1])
    ends, starts = [], []
    student_begins, teacher_begins = [0, *student_ends[:-1]], [0, *teacher_ends[:-1]]
    for i in range(len(shares)):
        for j in range(len(teacher_ends)):
            if shares[i] and student_ends[i] == teacher_ends[j] and teacher_ends[j] not in teacher_ends[:j]:
                ends.append((i, j))
            if student_begins[i] == teacher_begins[j] and student_begins[i] not in student_begins[i + 1 :]:
                starts += [(i, j)] if teacher_begins[j] not in teacher_begins[j + 1 :] else []
    return ends, starts
