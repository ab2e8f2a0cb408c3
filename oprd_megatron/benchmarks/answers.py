"""Finding the answer in a response: the last \\boxed{..}, or else the end of the text. Linear in its length."""

from __future__ import annotations

from dataclasses import dataclass

BOX = "\\boxed"

MOST_ANSWER_CHARS = 2000
"""A longer boxed answer is not read: right answers are far shorter, and reading takes more than linear time."""

TAIL_CHARS = 1000
"""Without a boxed answer, this much of the response's end is looked at."""


@dataclass(frozen=True)
class Found:
    """What to read in a response.

    Attributes:
        text: the content of the last box, or the end of the response.
        boxed: whether it is a box's.
    """

    text: str
    boxed: bool


def boxed_in(text: str) -> str | None:
    """Content of the last complete \\boxed{..}, braces inside it and all; None if there is none.

    A box that is opened and never closed, as in a response that was cut, is passed over. `\\boxed 5` is 5.
    """
    closing = _closing_braces(text)
    end = len(text)
    while (start := text.rfind(BOX, 0, end)) >= 0:
        end, place = start, start + len(BOX)
        while place < len(text) and text[place] == " ":
            place += 1
        if place < len(text) and text[place] == "{":
            if place in closing:
                return text[place + 1 : closing[place]]
        elif place > start + len(BOX) or text[place : place + 1].isdigit():
            word = text[place:].split(maxsplit=1)[:1]
            if word:
                return word[0].strip("$.,")
    return None


def answer_in(response: str, boxed_only: bool) -> Found | None:
    """What to read in a response; None if nothing.

    Args:
        response: text.
        boxed_only: without a box there is no answer.
    """
    boxed = boxed_in(response)
    if boxed is not None:
        return Found(boxed.strip(), True) if boxed.strip() else None
    tail = response[-TAIL_CHARS:].strip()
    return None if boxed_only or not tail else Found(tail, False)


def _closing_braces(text: str) -> dict[int, int]:
    """{place of an opening brace: place of the one that closes it}; escaped braces are text."""
    open_braces, closing = [], {}
    place = 0
    while place < len(text):
        char = text[place]
        if char == "\\":
            place += 1  # what follows is escaped: \{ or \} or the first letter of a command
        elif char == "{":
            open_braces.append(place)
        elif char == "}" and open_braces:
            closing[open_braces.pop()] = place
        place += 1
    return closing
