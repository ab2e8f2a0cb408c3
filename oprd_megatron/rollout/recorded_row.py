"""One row of a file of rollouts: its columns, and what makes it sound.

A row is a response. Columns:

    step, sample_index   integers: the training step (from 0) and the response's number in it (from 0); together a row's name
    prompt, response     text, for people
    finished             true or false, as in `Rollout`
    weight_version       integer: of the weights that wrote it
    prompt_ids, response_ids   lists of token ids
    logprobs             list of numbers, one for each response token, as in `Rollout`; or null
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from oprd_megatron.errors import DataError
from oprd_megatron.rollout.engine import Rollout

SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("sample_index", pa.int64(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("response", pa.string(), nullable=False),
        pa.field("finished", pa.bool_(), nullable=False),
        pa.field("weight_version", pa.int64(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("logprobs", pa.list_(pa.float32())),
    ]
)

Place = str


@dataclass(frozen=True)
class Recorded:
    """One row; the columns' meaning is at the top of this file."""

    step: int
    sample_index: int
    prompt: str
    response: str
    finished: bool
    weight_version: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None

    @classmethod
    def of(cls, rollout: Rollout, step: int, prompt: str, response: str) -> Recorded:
        """The row of a rollout; `prompt` and `response` are its text."""
        return cls(
            step,
            rollout.sample_index,
            prompt,
            response,
            rollout.finished,
            rollout.weight_version,
            rollout.prompt_ids,
            rollout.response_ids,
            rollout.logprobs,
        )

    def rollout(self, prompt_index: int) -> Rollout:
        """The rollout, as an answer to a prompt of a run."""
        return Rollout(
            prompt_index,
            self.sample_index,
            self.prompt_ids,
            self.response_ids,
            self.weight_version,
            self.finished,
            self.logprobs,
        )


def checked_row(values: dict[str, Any], place: Place) -> Recorded:
    """A row, with lists as tuples.

    Raises:
        DataError: a field is missing or of another type, the response is empty, a log-probability is not one, or their number
            is not that of the response's tokens.
    """
    for name in SCHEMA.names:
        if name not in values:
            raise DataError(f"{place}: no field {name!r}; the fields are {', '.join(values) or 'none'}")
    for name, (expected, is_one) in _KINDS.items():
        if not is_one(values[name]):
            raise DataError(
                f"{place}: {name!r} is {str(values[name])[:60]!r}, expected {expected}; record the file again"
            )
    response, logprobs = values["response_ids"], values["logprobs"]
    if len(response) == 0:
        raise DataError(f"{place}: the response has no tokens; leave such a response out, or record the file again")
    if logprobs is not None:
        if len(logprobs) != len(response):
            raise DataError(
                f"{place}: {len(logprobs)} logprobs for {len(response)} response tokens; record the file again, or set "
                "logprobs to null"
            )
        bad = next((index for index, value in enumerate(logprobs) if not -math.inf < value <= 0), None)
        if bad is not None:
            raise DataError(
                f"{place}: the log-probability of response token {bad} is {logprobs[bad]}, not a number of 0 or less; the "
                "weights that wrote it may hold NaN: look at them, and record the file again"
            )
    of_tokens = {name: tuple(values[name]) for name in ("prompt_ids", "response_ids")}
    kept = {name: values[name] for name in SCHEMA.names}
    return Recorded(**{**kept, **of_tokens, "logprobs": None if logprobs is None else tuple(map(float, logprobs))})


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_ids(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_count, value))


def _is_numbers(value: Any) -> bool:
    return value is None or (isinstance(value, (list, tuple)) and all(type(item) in (int, float) for item in value))


_KINDS = {
    "step": ("an integer from 0", _is_count),
    "sample_index": ("an integer from 0", _is_count),
    "prompt": ("text", lambda value: isinstance(value, str)),
    "response": ("text", lambda value: isinstance(value, str)),
    "finished": ("true or false", lambda value: isinstance(value, bool)),
    "weight_version": ("an integer from 0", _is_count),
    "prompt_ids": ("a list of token ids", _is_ids),
    "response_ids": ("a list of token ids", _is_ids),
    "logprobs": ("a list of numbers or null", _is_numbers),
}
