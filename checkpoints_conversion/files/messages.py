"""Text out of a file in a message: one line, short, nothing that a terminal would act on."""

from __future__ import annotations

import reprlib
from typing import Any

MAX_SHOWN = 100
"""Characters of a value that a message repeats."""

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = MAX_SHOWN
_REPR.maxlevel = 3


def shown(value: Any) -> str:
    """A name for a message, cut and escaped; anything but a string as `quoted`."""
    text = value if isinstance(value, str) else _REPR.repr(value)
    cut = text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in cut)


def quoted(value: Any) -> str:
    """Any value for a message, as `repr` would write it but cut."""
    return shown(_REPR.repr(value))


def reason(error: BaseException) -> str:
    """The first line of an exception's text, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return shown(lines[0]) if lines else type(error).__name__
