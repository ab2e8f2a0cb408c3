"""Which token positions of a rollout are supervised. This module owns the position convention.

A sequence is prompt + response; indices are 0-based within it. Response token y_t (t = 1..T) sits at index
`prompt_length + t - 1`. The state AT y_t, after reading it, has the same index: that is the `token` anchor, the authors'
slice [-T:]. The state that PREDICTS y_t is one earlier: the `predictor` anchor. Next-token distributions of y_t are always
made of that one: logits at index i are of the token at i + 1.

Right padding comes after the response and is never supervised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from oprd_megatron.config.schema import DistillConfig

Which = Literal["all", "last", "last_k", "first_k"]


def supervised_positions(prompt_length: int, response_length: int, config: DistillConfig) -> range:
    """Sequence indices of the supervised states of one rollout, ascending.

    `last_k` and `first_k` take min(k, response_length) tokens. A prompt of length 0 has no state that predicts y_1: with
    the `predictor` anchor that position is left out.
    """
    chosen = choose(response_length, config)
    shift = prompt_length - (1 if config.position_anchor == "predictor" else 0)
    return range(max(0, chosen.start + shift), max(0, chosen.stop + shift))


def choose(count: int, config: DistillConfig) -> range:
    """Which of `count` tokens that could be supervised, in order, are."""
    return some_of(count, config.positions, config.k)


def some_of(count: int, which: Which, k: int) -> range:
    """all of `count`, the last, or min(k, count) at the end or beginning."""
    kept = {"all": count, "last": min(1, count)}.get(which, min(k, count))
    first = 0 if which == "first_k" else count - kept
    return range(first, first + kept)


def predicting_positions(prompt_length: int, response_indices: Sequence[int]) -> list[int]:
    """Sequence indices of the states whose logits are of these response tokens (0-based within the response).

    The prompt must not be empty: nothing would predict y_1.
    """
    assert prompt_length > 0 or 0 not in response_indices
    return [prompt_length - 1 + index for index in response_indices]
