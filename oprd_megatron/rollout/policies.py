"""Which of a step's responses are learned from: what is done with truncated, repeated and empty ones.

Pure functions. A step may be learned in groups (`schedule: overlap`): each is curated with the results of those before it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from oprd_megatron.config.rollout import RolloutConfig
from oprd_megatron.errors import DataError
from oprd_megatron.rollout.engine import Rollout


@dataclass(frozen=True)
class Curated:
    """Some responses of a step after its policies.

    Attributes:
        kept: those that become samples, in order.
        masked: sample indices of `kept` ones that teach nothing, but whose tokens count in the loss's mean.
        texts: what was there, dropped or not: (prompt index, response ids, finished).
        total, tokens: responses and response tokens that there were.
        truncated, duplicate, empty: responses of each kind, whatever was done with them.
        wasted_tokens: response tokens of those that were dropped or masked.
    """

    kept: tuple[Rollout, ...]
    masked: frozenset[int]
    texts: frozenset[tuple[int, tuple[int, ...], bool]]
    total: int
    tokens: int
    truncated: int
    duplicate: int
    empty: int
    wasted_tokens: int


def curate(
    rollouts: Sequence[Rollout], section: RolloutConfig, eos_ids: Collection[int], earlier: Sequence[Curated] = ()
) -> Curated:
    """Apply a run's policies.

    Args:
        rollouts: in order. Of equal responses the first is kept; equal are those to one row of the prompt file with the same
            ids that ended alike.
        section: with `truncated`, `duplicates` and `empty`.
        eos_ids: the student's end-of-sequence ids; one of them alone is an empty response.
        earlier: of the same step, what came before.
    """
    texts = set().union(*(part.texts for part in earlier))
    kept, masked, wasted, truncated, duplicate, empty = list[Rollout](), set[int](), 0, 0, 0, 0
    for rollout in rollouts:
        text = (rollout.prompt_index, rollout.response_ids, rollout.finished)
        is_again = text in texts
        is_empty = len(rollout.response_ids) == 1 and rollout.response_ids[0] in eos_ids
        texts.add(text)
        truncated += not rollout.finished
        duplicate += is_again
        empty += is_empty
        is_dropped = (
            (section.truncated == "drop" and not rollout.finished)
            or (section.duplicates == "drop" and is_again)
            or (section.empty == "drop" and is_empty)
        )
        is_masked = not is_dropped and section.truncated == "mask" and not rollout.finished
        if not is_dropped:
            kept.append(rollout)
        if is_masked:
            masked.add(rollout.sample_index)
        if is_dropped or is_masked:
            wasted += len(rollout.response_ids)
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    return Curated(
        tuple(kept),
        frozenset(masked),
        frozenset(texts),
        len(rollouts),
        tokens,
        truncated,
        duplicate,
        empty,
        wasted,
    )


def figures(parts: Sequence[Curated], also_masked: Collection[int] = ()) -> dict[str, float]:
    """For the metrics, of all parts of a step: shares of its responses, and `wasted_tokens` as a share of its tokens.

    Args:
        parts: all of the step's.
        also_masked: sample indices that something else masks.
    """
    total, tokens = sum(part.total for part in parts), sum(part.tokens for part in parts)
    counts = {name: sum(getattr(part, name) for part in parts) for name in ("truncated", "duplicate", "empty")}
    counts["dropped"] = total - sum(len(part.kept) for part in parts)
    more = [
        r for part in parts for r in part.kept if r.sample_index in also_masked and r.sample_index not in part.masked
    ]
    counts["masked"] = sum(len(part.masked) for part in parts) + len(more)
    wasted = sum(part.wasted_tokens for part in parts) + sum(len(rollout.response_ids) for rollout in more)
    return {**{name: count / total for name, count in counts.items()}, "wasted_tokens": wasted / tokens}


def refuse_nothing(parts: Sequence[Curated], step: int, also_masked: Collection[int] = ()) -> None:
    """A step must have something to learn from.

    Args:
        parts: all of the step's.
        step: counted from 1, for the message.
        also_masked: sample indices that something else masks.

    Raises:
        DataError: every response was dropped or masked.
    """
    masked = frozenset(also_masked).union(*(part.masked for part in parts))
    if any(rollout.sample_index not in masked for part in parts for rollout in part.kept):
        return
    counts = {name: sum(getattr(part, name) for part in parts) for name in ("total", "truncated", "duplicate", "empty")}
    raise DataError(
        f"step {step}: nothing is left to learn from of {counts['total']} responses: {counts['truncated']} truncated, "
        f"{counts['duplicate']} repeated, {counts['empty']} empty, {len(masked)} masked; raise "
        "rollout.max_response_tokens or temperature, or set rollout.truncated, duplicates or empty to keep"
    )
