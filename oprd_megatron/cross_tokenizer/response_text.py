"""The text of a student's response: what a teacher can read of bytes that need not be UTF-8."""

from __future__ import annotations

import codecs

import numpy as np

from oprd_megatron.cross_tokenizer.align import UNKNOWN


def readable_text(data: bytes) -> tuple[str, np.ndarray]:
    """Decode a response; a character cut off at its end is left out, and invalid bytes become U+FFFD.

    Args:
        data: The response's bytes.

    Returns:
        The text, and for each byte of its UTF-8, and its end, the place in `data`: [bytes + 1] int64, UNKNOWN inside a
        U+FFFD that stands for invalid bytes.
    """
    text, length = codecs.utf_8_decode(data, "replace", False)
    if len(text.encode()) == length and data.startswith(text.encode()):
        return text, np.arange(length + 1)
    places, position = [0], 0
    while position < length:
        try:
            valid = len(data[position:length].decode().encode())
            invalid = 0
        except UnicodeDecodeError as error:
            valid, invalid = error.start, error.end - error.start
        places += range(position + 1, position + valid + 1)
        position += valid + invalid
        if invalid:
            places += [UNKNOWN, UNKNOWN, position]
    return text, np.array(places, dtype=np.int64)
