"""What text a token id stands for, byte by byte, for every kind of tokenizer that language models use.

A vocabulary spells its tokens in one of two scripts:

- byte-level (GPT-2, Llama 3, Qwen, SmolLM2): one letter a byte, "Ġthe" is b" the";
- SentencePiece's (Llama 2, Gemma, Unigram): text with "▁" for a space, and "<0xE2>" for a byte that no token spells.

Which one it is, is asked of the tokenizer itself: how it writes a line feed and a space before it looks for tokens. A
tokenizer that drops spaces (WordPiece) cannot be followed through a text and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
from transformers import PreTrainedTokenizerBase

from oprd_megatron.errors import DataError

ANCHOR = "0"
"""Written around a piece of text to keep a tokenizer from treating its edges as a text's edges. A digit, because no
combining mark composes with one."""
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def _alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest follows from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


LETTERS = _alphabet()


class Script:
    """How a fast tokenizer writes text before it looks for tokens in it.

    Attributes:
        lead: What it writes before any text (a SentencePiece dummy space), often "".
        space: What it writes for a space.
        byte_level: Whether it writes one letter a byte.

    Raises:
        DataError: it is not a fast tokenizer, or it does not keep spaces and digits apart.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"the tokenizer {tokenizer.name_or_path!r} has no tokenizer.json; aligning two tokenizers needs one: "
                "save it with transformers' fast version"
            )
        self._backend = tokenizer.backend_tokenizer
        written = self.write(ANCHOR)
        self.lead = written.removesuffix(ANCHOR)
        self.space = self.inside(" ") or ""
        if written == self.lead or not self.space:
            raise DataError(
                f"the tokenizer {tokenizer.name_or_path!r} drops spaces or digits, so its tokens have no place in a "
                "text; use a model with a byte-level BPE or SentencePiece tokenizer"
            )
        self.byte_level = self.inside("\n") == "Ċ"

    def write(self, text: str) -> str:
        """The text as the tokenizer's vocabulary would spell it, as one string."""
        normalizer, splitter = self._backend.normalizer, self._backend.pre_tokenizer
        normal = text if normalizer is None else normalizer.normalize_str(text)
        return normal if splitter is None else "".join(piece for piece, _ in splitter.pre_tokenize_str(normal))

    def inside(self, text: str) -> str | None:
        """The same in the middle of a longer text; None if what stands around it changes too."""
        written, before = self.write(ANCHOR + text + ANCHOR), self.lead + ANCHOR
        if len(written) <= len(before) or not written.startswith(before) or not written.endswith(ANCHOR):
            return None
        return written[len(before) : -len(ANCHOR)]

    def to_bytes(self, written: str) -> bytes:
        """Spelling to bytes; in SentencePiece's script a space stays what stands for it."""
        if self.byte_level and all(letter in LETTERS for letter in written):
            return bytes(LETTERS[letter] for letter in written)
        return written.encode()


class TokenBytes:
    """Bytes of every token id of a Hugging Face tokenizer.

    Args:
        tokenizer: A fast tokenizer.

    Attributes:
        script: How it spells text.
        special: Ids of its special tokens.
        literal: Its other added tokens and the text each stands for.
        unknown_id: Id of its unknown token, or None.

    Raises:
        DataError: see `Script`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.script = Script(tokenizer)
        added = tokenizer.added_tokens_decoder
        self.special = frozenset(tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}
        self.literal = {index: token.content for index, token in added.items() if index not in self.special}
        self.unknown_id = tokenizer.unk_token_id
        self._backend = tokenizer.backend_tokenizer
        self._byte_pieces = not self.script.byte_level and self._backend.token_to_id("<0xFF>") is not None
        self._cache: dict[int, bytes] = {}

    def of(self, token_id: int) -> bytes:
        """The token's share of the text: b"" for special tokens and ids without a token, else its exact bytes."""
        found = self._cache.get(token_id)
        if found is None:
            found = self._cache[token_id] = self._in_text(token_id)
        return found

    def ends(self, ids: Iterable[int]) -> np.ndarray:
        """Bytes of text read after each token: [N] int64, cumulative."""
        return np.cumsum([len(self.of(token_id)) for token_id in ids], dtype=np.int64)

    def is_byte_piece(self, token: str) -> bool:
        """Whether a token of this vocabulary is a single byte, written <0xE2>."""
        return self._byte_pieces and BYTE_PIECE.fullmatch(token) is not None

    def spelled(self, token_id: int) -> bytes:
        """The token in the tokenizer's own script (see `Script.to_bytes`); b"" as in `of`."""
        token = self._backend.id_to_token(token_id)
        if token is None or token_id in self.special:
            return b""
        if token_id in self.literal:
            return token.encode()
        if self.is_byte_piece(token):
            return bytes([int(token[3:5], 16)])
        return self.script.to_bytes(token)

    def letters(self, character: str) -> list[int]:
        """Ids that spell one character letter by letter, or byte by byte, or as the unknown token."""
        ids: list[int | None] = []
        for letter in self.script.inside(character) or character:
            found = self._backend.token_to_id(letter)
            if found is None and self._byte_pieces:
                ids += [self._backend.token_to_id(f"<0x{byte:02X}>") for byte in letter.encode()]
            else:
                ids.append(self.unknown_id if found is None else found)
        return [token_id for token_id in ids if token_id is not None]

    def _in_text(self, token_id: int) -> bytes:
        spelled = self.spelled(token_id)
        if self.script.byte_level or len(spelled) == 1:
            return spelled
        return spelled.replace(self.script.space.encode(), b" ")
