"""A text read by the teacher's tokenizer: its tokens, and the byte of the text at which each of them ends.

Tokenizers read a rewritten text: normalised (NFC composes e + U+0301), with "▁" for spaces, with a space before it. The
offsets that they report are of no use as proof: Qwen's says that a composed é covers the e alone. So an end is derived
from the tokens' own spelling:

1. Added tokens ("<think>") are found in the raw text; they cut it into runs, and each run was rewritten by itself.
2. A run is cut into segments that are rewritten independently: a character with its combining marks.
3. The segments' rewritings, joined, must be the run's tokens, joined; else nothing in the run is proven.
4. Then the place of every segment in the rewriting is known, and of every character and byte that it left as they were.

A place in the rewriting that belongs to two places of the text (something between them was dropped) proves nothing.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from oprd_megatron.cross_tokenizer.align import UNKNOWN
from oprd_megatron.cross_tokenizer.token_bytes import Script, TokenBytes


@dataclass(frozen=True)
class Segment:
    """One segment's rewriting, and the places that it shares with the text.

    Attributes:
        spelled: The rewriting.
        num_bytes: Length of the segment in the text.
        places: Pairs (bytes of the rewriting, bytes of the text) that are one place, ascending, (0, 0) left out.
    """

    spelled: bytes
    num_bytes: int
    places: tuple[tuple[int, int], ...]


class Reader:
    """Reads text as a teacher does.

    Text that looks like one of its special tokens is read as text; its other added tokens ("<think>") are read as those.

    Args:
        tokenizer: The teacher's, a fast one.

    Raises:
        DataError: see `Script`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens = TokenBytes(tokenizer)
        self._segments: dict[str, Segment | None] = {}

    def read(self, text: str) -> tuple[tuple[int, ...], np.ndarray]:
        """Tokenise a text, without special tokens around it.

        Returns:
            The M token ids, and for each the byte of the text's UTF-8 at which it ends: [M] int64, UNKNOWN where that is
            not proven.
        """
        tokens = list(self._cut(text))
        ends = np.full(len(tokens), UNKNOWN, dtype=np.int64)
        byte_at = np.cumsum([0, *(len(character.encode()) for character in text)])
        first_token = first_character = 0
        for index, (token_id, begin, end) in enumerate(tokens):
            literal = self._tokens.literal.get(token_id) == text[begin:end]
            if literal or token_id == self._tokens.unknown_id:
                run = [each[0] for each in tokens[first_token:index]]
                ends[first_token:index] = self._run_ends(run, text[first_character:begin], byte_at[first_character])
                ends[index] = byte_at[end] if literal else UNKNOWN
                first_token, first_character = index + 1, end
        run = [each[0] for each in tokens[first_token:]]
        ends[first_token:] = self._run_ends(run, text[first_character:], byte_at[first_character])
        return tuple(token_id for token_id, _, _ in tokens), ends

    def _cut(self, text: str) -> Iterator[tuple[int, int, int]]:
        """The text's tokens: id, first character and the one after the last, as the tokenizer reports them."""
        encoded = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        for token_id, (begin, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            token = self._tokenizer.backend_tokenizer.id_to_token(token_id)
            control = token_id in self._tokens.special or self._tokens.is_byte_piece(token)
            if control and text[begin:end] == token:  # Unigram finds "</s>" and "<0x41>" in plain text
                for index, character in enumerate(token):
                    for spelled in self._tokens.letters(character):
                        yield spelled, begin + index, begin + index + 1
            else:
                yield token_id, begin, end

    def _run_ends(self, run: list[int], text: str, first_byte: int) -> np.ndarray:
        """Byte ends of a run's tokens in a text that starts at `first_byte` of the whole."""
        spellings = [self._tokens.spelled(token_id) for token_id in run]
        spelled = b"".join(spellings)
        place_of = self._places(spelled, text)
        if place_of is None:
            return np.full(len(run), UNKNOWN, dtype=np.int64)
        places = place_of[np.cumsum([len(each) for each in spellings], dtype=np.int64)]
        return np.where(places == UNKNOWN, UNKNOWN, places + first_byte)

    def _places(self, spelled: bytes, text: str) -> np.ndarray | None:
        """For each of the bytes of a run's spelling, and its end, the byte of the text at that place; UNKNOWN if none.

        None if the spelling is not what the tokenizer makes of this text.
        """
        if spelled == text.encode():
            return np.arange(len(spelled) + 1)
        segments = [self._segment(characters) for characters in _segments(text)]
        known = [segment for segment in segments if segment is not None]
        lead = self._tokens.script.to_bytes(self._tokens.script.lead)
        joined = b"".join(segment.spelled for segment in known)
        if len(known) < len(segments) or spelled not in (joined, lead + joined):
            return None
        at, at_text = len(spelled) - len(joined), 0
        pairs = [(at, 0)]
        for segment in known:
            pairs += [(at + place, at_text + place_in_text) for place, place_in_text in segment.places]
            at, at_text = at + len(segment.spelled), at_text + segment.num_bytes
        places, in_text = np.array(pairs, dtype=np.int64).T
        _, first, count = np.unique(places, return_index=True, return_counts=True)
        once = first[count == 1]
        result = np.full(len(spelled) + 1, UNKNOWN, dtype=np.int64)
        result[places[once]] = in_text[once]
        return result

    def _segment(self, characters: str) -> Segment | None:
        if characters not in self._segments:
            self._segments[characters] = _make_segment(self._tokens.script, characters)
        return self._segments[characters]


def _segments(text: str) -> Iterator[str]:
    """A text cut before every character that cannot compose with those before it."""
    first = 0
    for index, character in enumerate(text):
        jamo = "\u1160" <= character <= "\u11ff"  # vowels and final consonants of Hangul syllables
        if index > first and not jamo and not unicodedata.category(character).startswith("M"):
            yield text[first:index]
            first = index
    if text:
        yield text[first:]


def _make_segment(script: Script, characters: str) -> Segment | None:
    """Rewrite every prefix of a segment; where one is a prefix of the whole's rewriting, the two share a place."""
    whole = script.inside(characters)
    if whole is None:
        return None
    spelled, places = script.to_bytes(whole), []
    before, at_text, before_shared = b"", 0, True
    for index, character in enumerate(characters):
        written = script.inside(characters[: index + 1])
        if written is None:
            return None
        prefix, encoded = script.to_bytes(written), character.encode()
        shared = spelled.startswith(prefix)
        if shared and before_shared and prefix == before + encoded:
            places += [(len(before) + byte, at_text + byte) for byte in range(1, len(encoded))]
        at_text += len(encoded)
        if shared:
            places.append((len(prefix), at_text))
        before, before_shared = prefix, shared
    return Segment(spelled, at_text, tuple(places))
