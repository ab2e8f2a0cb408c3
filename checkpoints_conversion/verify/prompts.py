"""What both models read: a few texts, each cut or repeated to the same number of tokens.

Of one length, they need no padding, and every position counts. Models that compute something else beyond a length (a sliding
window, longrope's original length) get one more text that is longer, and one that is not, where that is short enough.

Legend: B texts, T tokens of each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints_conversion.architecture import Architecture, LongRope
from checkpoints_conversion.files.json_file import parse
from checkpoints_conversion.files.messages import reason
from checkpoints_conversion.files.regular_file import read_whole
from oprd_megatron.errors import DataError

TEXTS = (
    "The river had been frozen for a week when the first sledges crossed it, and by noon the whole town stood on the bank to "
    "see whether the ice would carry the mill's new boiler, which weighed more than any of them dared to say aloud.",
    "def median(values: list[float]) -> float:\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n"
    "    if len(ordered) % 2:\n        return ordered[middle]\n    return (ordered[middle - 1] + ordered[middle]) / 2\n",
    "Question: a train leaves at 9:40 and travels 210 km at 84 km/h. When does it arrive? Answer: 210 / 84 = 2.5 hours, which "
    "is 2 h 30 min, so it arrives at 12:10. Check: 84 * 2.5 = 210.",
    "Wir treffen uns um 8 Uhr am Bahnhof. Nous prendrons le train de 9 heures. "
    "日本語の文章も少しだけ。 ¿Y después? Потом видно будет.",
)
MAX_PROMPTS = 64
MAX_TOKENS = 2**14
"""Of all prompts together: their states after one layer are in memory."""
SHORT_LENGTH = 512
"""A window or an original length up to this is passed."""
BEYOND = 16
"""Tokens past it."""
MAX_FILE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Prompts:
    """Token ids, one tensor [B, T] a length, and what they are in one line."""

    batches: list[torch.Tensor]
    description: str


def make_prompts(arch: Architecture, tokenizer: Any, num_tokens: int, file: Path | None) -> Prompts:
    """The prompts of a comparison.

    Args:
        arch: of the model.
        tokenizer: of `load_tokenizer`; None: random ids.
        num_tokens: T, unless the model takes fewer.
        file: texts of the user's; see `read_texts`.

    Raises:
        DataError: the file holds no text, too many, or there is no tokenizer to read it with.
    """
    texts = list(TEXTS if file is None else read_texts(file))
    if file is not None and tokenizer is None:
        raise DataError(f"{file}: neither model has a tokenizer to read it with; leave --prompts out for random ids")
    if len(texts) > MAX_PROMPTS or len(texts) * num_tokens > MAX_TOKENS:
        raise DataError(
            f"{len(texts)} prompts of {num_tokens} tokens: at most {MAX_PROMPTS} and {MAX_TOKENS} tokens in all; give fewer"
        )
    num_tokens = min(num_tokens, arch.max_position_embeddings)
    rows = [_ids(tokenizer, text, number, arch.vocab_size) for number, text in enumerate(texts)]
    batches = [torch.stack([_of_length(row, num_tokens) for row in rows])]
    others, not_passed = _other_lengths(arch, num_tokens)
    batches += [_of_length(torch.cat(rows), length)[None] for length in others]
    source = "random ids" if tokenizer is None else "built-in texts" if file is None else str(file)
    sizes = [f"{len(rows)} x {num_tokens} tokens", *(f"1 x {length}" for length in others)]
    return Prompts(batches, "; ".join([f"{', '.join(sizes)} ({source})", *not_passed]))


def read_texts(file: Path) -> Iterator[str]:
    """Each line of a text file, or `prompt` or `text` of each line of a .jsonl file; empty lines are left out.

    Raises:
        DataError: not UTF-8, no JSON object with such a text, or nothing in it.
    """
    try:
        lines = read_whole(file, MAX_FILE_BYTES).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: byte {error.start} is no UTF-8; save it as UTF-8") from None
    lines_with_text = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not lines_with_text:
        raise DataError(f"{file}: holds no text; write one prompt a line")
    for number, line in lines_with_text:
        yield line if file.suffix != ".jsonl" else _text_of(line, f"{file}, line {number}")


def _text_of(line: str, where: str) -> str:
    try:
        entry = parse(line.encode())
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({reason(error)})") from None
    found = next((entry[key] for key in ("prompt", "text") if key in entry), None) if isinstance(entry, dict) else None
    if not isinstance(found, str) or not found.strip():
        raise DataError(f"{where}: needs a JSON object with a text named prompt or text, not {json.dumps(entry)[:80]}")
    return found


def _ids(tokenizer: Any, text: str, number: int, vocab_size: int) -> torch.Tensor:
    """[tokens]; random ones without a tokenizer, or where it has ids that the model does not."""
    ids = [] if tokenizer is None else tokenizer(text)["input_ids"]
    if not ids or max(ids) >= vocab_size:
        return torch.randint(vocab_size, (SHORT_LENGTH,), generator=torch.Generator().manual_seed(number))
    return torch.tensor(ids)


def _of_length(ids: torch.Tensor, length: int) -> torch.Tensor:
    return ids.repeat(-(-length // len(ids)))[:length]


def _other_lengths(arch: Architecture, num_tokens: int) -> tuple[list[int], list[str]]:
    """Lengths on the side of each limit that `num_tokens` are not on, and in words the limits that none passes."""
    limits = {f"the window of {size}": size for size in arch.attention_windows if size is not None}
    rope = arch.rope_scaling
    lengths, not_passed = set(), []
    if isinstance(rope, LongRope):
        original = rope.original_max_position_embeddings
        limits[f"longrope's original length of {original}"] = original
        if original < num_tokens:
            lengths.add(original)
    for what, limit in limits.items():
        if num_tokens > limit:
            continue
        if limit + BEYOND <= min(SHORT_LENGTH, arch.max_position_embeddings):
            lengths.add(limit + BEYOND)
        else:
            not_passed.append(f"{what} is not passed")
    return sorted(lengths), not_passed
