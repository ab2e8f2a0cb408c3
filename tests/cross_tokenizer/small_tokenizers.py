"""Small tokenizers of every kind that language models use, trained in milliseconds on a few lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "The cat sat on the mat, and the other cats sat there too. What is 12 + 34?",
    "def add(a, b):\n    return a + b  # the sum\n\n\tfor x in range(10): print(x)",
    "\\frac{1}{2} \\sum_{i=0}^{n} x_i = \\alpha; the answer is $\\boxed{42}$ 0123456789",
    "naïve cafés für größere Häuser: e\u0301, Việt Nam, 日本語の文字, 中文字符, 한국어, привет",
    "👨‍👩‍👧 🙂🙂 👍🏽 🇫🇷 <eos> </s> <|im_end|> <think> thinking </think> ▁ ▁▁",
]


def _trained(vocab_size: int, tokenizer: Tokenizer) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet() if "ByteLevel" in repr(tokenizer.pre_tokenizer) else []
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def _wrapped(tokenizer: Tokenizer, literals: tuple[str, ...] = (), **special: str) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens([AddedToken(literal, normalized=False, special=False) for literal in literals])
    tokenizer.add_special_tokens(list(special.values()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def byte_level(vocab_size: int = 420, normalizer: normalizers.Normalizer | None = None) -> PreTrainedTokenizerFast:
    """As SmolLM2's, with offsets trimmed of spaces as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer = _trained(vocab_size, tokenizer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return _wrapped(tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>")


def qwen_like(vocab_size: int = 500) -> PreTrainedTokenizerFast:
    """NFC, then byte-level; <think> is an added token that is not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(r"[^\s\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return _wrapped(_trained(vocab_size, tokenizer), ("<think>", "</think>"), eos_token="<|im_end|>")


def _with_byte_pieces(tokenizer: Tokenizer) -> Tokenizer:
    described = json.loads(tokenizer.to_str())
    vocab = described["model"]["vocab"]
    for piece in ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]:
        vocab[piece] = len(vocab)
    described["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    return Tokenizer.from_str(json.dumps(described))


def gemma_like(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """SentencePiece BPE with byte fallback and no space before the text; line feeds are added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer = _with_byte_pieces(_trained(vocab_size, tokenizer))
    return _wrapped(tokenizer, ("\n", "\n\n", "▁▁"), unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")


def llama_like(vocab_size: int = 260) -> PreTrainedTokenizerFast:
    """SentencePiece BPE with byte fallback that puts a space before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = _with_byte_pieces(_trained(vocab_size, tokenizer))
    return _wrapped(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def unigram(byte_fallback: bool = False) -> PreTrainedTokenizerFast:
    """Unigram with Metaspace; "</s>" is a piece of the model too, as in files converted from SentencePiece."""
    letters = sorted({letter for line in LINES[:3] for letter in line if letter not in " \n\t"} | set("<>/s日▁"))
    words = ["▁the", "▁cat", "▁cats", "at", "▁and", "▁s", "th", "日本", "▁x", "ing", "▁<", "12"]
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((word, -3.0) for word in words), *((each, -6.0) for each in letters)]
    if byte_fallback:
        pieces += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return _wrapped(tokenizer, unk_token="<unk>", eos_token="</s>")


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte_level": byte_level,
    "qwen_like": qwen_like,
    "gemma_like": gemma_like,
    "llama_like": llama_like,
    "unigram": unigram,
    "unigram_bytes": lambda: unigram(byte_fallback=True),
    "lowercase": lambda: byte_level(380, normalizers.Lowercase()),
    "no_accents": lambda: byte_level(390, normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
}


@cache
def small_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One of `KINDS`, made once."""
    return KINDS[kind]()
