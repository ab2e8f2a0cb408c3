"""JSON from files that strangers wrote: a value, or one line that names the file. No input is too large, deep or odd.

Python's parser accepts two values for one key and keeps the last; here that is damage, for two programs would read two
different models from such a file.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from checkpoints_conversion.files.messages import reason, shown
from checkpoints_conversion.files.regular_file import read_whole
from oprd_megatron.errors import CheckpointError

MAX_BYTES = 64 * 2**20
"""Of any JSON file of a model: the index of 100,000 tensors has 10 MB, the largest tokenizer 35 MB."""


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """The value in a file.

    Raises:
        CheckpointError: no regular file, unreadable, larger than `max_bytes`, not JSON, a key twice, or nested too deeply.
    """
    text = read_whole(path, max_bytes)
    try:
        return parse(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({reason(error)}); download it again") from None


def parse(text: bytes) -> Any:
    """The value in UTF-8 `text`.

    Raises:
        ValueError: not JSON, not UTF-8, a key twice, a number of thousands of digits, or nested too deeply.
    """
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is no UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{shown(twice)} is there twice")
    return found
