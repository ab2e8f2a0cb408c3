"""What a step's policies keep, drop and mask, and the figures about it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oprd_megatron.config.rollout import RolloutConfig
from oprd_megatron.errors import DataError
from oprd_megatron.rollout import Rollout
from oprd_megatron.rollout.policies import Curated, curate, figures, refuse_nothing

EOS = [2, 9]


def section(**policies: Any) -> RolloutConfig:
    return RolloutConfig(prompts={"path": Path("p.jsonl")}, **policies)


def rollout(index: int, ids: tuple[int, ...], prompt: int = 0, finished: bool = True) -> Rollout:
    return Rollout(prompt, index, (1, prompt), ids, 0, finished)


STEP = [
    rollout(0, (5, 6, 2)),
    rollout(1, (5, 6, 7, 8), finished=False),
    rollout(2, (5, 6, 2)),  # again
    rollout(3, (5, 6, 2), prompt=1),  # to another prompt: not again
    rollout(4, (9,)),  # empty
    rollout(5, (5,)),  # one token, but not empty
    rollout(6, (5, 6, 7, 8), finished=False),  # truncated, and again
    rollout(7, (9,), prompt=1),  # empty
    rollout(8, (9,), prompt=1),  # empty, and again
    rollout(9, (2,), prompt=1, finished=True),  # empty, by the other end
]
"""22 response tokens."""


def kept(curated: Curated) -> list[int]:
    return [each.sample_index for each in curated.kept]


@pytest.mark.parametrize("policies, left, masked, wasted", [
    ({}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [], 0),
    ({"truncated": "drop"}, [0, 2, 3, 4, 5, 7, 8, 9], [], 8),
    ({"truncated": "mask"}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 6], 8),
    ({"duplicates": "drop"}, [0, 1, 3, 4, 5, 7, 9], [], 8),
    ({"truncated": "mask", "duplicates": "drop"}, [0, 1, 3, 4, 5, 7, 9], [1], 12),
    ({"empty": "drop"}, [0, 1, 2, 3, 5, 6], [], 4),
    ({"truncated": "drop", "duplicates": "drop", "empty": "drop"}, [0, 3, 5], [], 15),
])  # fmt: skip
def test_policies(policies: dict[str, str], left: list[int], masked: list[int], wasted: int) -> None:
    """Kept in order; masked ones are among them; the kinds are counted whatever is done with them."""
    curated = curate(STEP, section(**policies), EOS)
    assert kept(curated) == left
    assert sorted(curated.masked) == masked
    assert figures([curated]) == pytest.approx({
        "truncated": 0.2, "duplicate": 0.3, "empty": 0.4, "dropped": 1 - len(left) / 10, "masked": len(masked) / 10,
        "wasted_tokens": wasted / 22,
    })  # fmt: skip


def test_what_is_neither_repeated_nor_empty() -> None:
    """Equal tokens of which only one ended by itself (the other was cut by a time limit); more than an end of sequence."""
    step = [rollout(0, (5, 6), finished=False), rollout(1, (5, 6)), rollout(2, (9, 5, 2))]
    curated = curate(step, section(truncated="drop", duplicates="drop", empty="drop"), EOS)
    assert kept(curated) == [1, 2]
    assert (curated.duplicate, curated.empty) == (0, 0)


def test_what_something_else_masks_is_counted_once() -> None:
    """Of kept responses; those that a policy masks or drops are counted already."""
    parts = [curate(STEP[:4], section(truncated="mask", empty="drop"), EOS)]
    parts.append(curate(STEP[4:], section(truncated="mask", empty="drop"), EOS, parts))
    found, plain = figures(parts, also_masked={0, 1, 4, 5}), figures(parts)
    assert (plain["masked"], plain["wasted_tokens"]) == (0.2, 12 / 22)
    assert found == {**plain, "masked": 0.4, "wasted_tokens": (12 + 3 + 1) / 22}


def test_groups_of_a_step_are_as_the_whole() -> None:
    """However a step is cut into groups, every policy keeps the same responses and comes to the same figures."""
    random = np.random.default_rng(0)
    step = [
        rollout(index, tuple(random.integers(1, 4, random.integers(1, 3)).tolist()), int(index % 2), bool(index % 3))
        for index in range(40)
    ]
    choices = itertools.product(("keep", "mask", "drop"), ("keep", "drop"), ("keep", "drop"))
    for truncated, duplicates, empty in choices:
        policies = section(truncated=truncated, duplicates=duplicates, empty=empty)
        whole, parts = curate(step, policies, EOS), list[Curated]()
        for group in (step[:7], step[7:8], [], step[8:30], step[30:]):
            parts.append(curate(group, policies, EOS, parts))
        assert [index for part in parts for index in kept(part)] == kept(whole)
        assert frozenset().union(*(part.masked for part in parts)) == whole.masked
        assert figures(parts) == figures([whole])
    assert figures([whole])["duplicate"] > 0.1


def test_a_step_with_nothing_left_is_one_line() -> None:
    """All dropped, all masked, or some dropped and the others masked, here or by something else; with counts."""
    cut = [rollout(index, (5, 6, index), finished=False) for index in range(3)]
    for policy, masked in (("drop", 0), ("mask", 3)):
        curated = curate(cut, section(truncated=policy), EOS)
        message = (
            f"step 4: nothing is left to learn from of 3 responses: 3 truncated, 0 repeated, 0 empty, {masked} masked; "
        )
        with pytest.raises(DataError, match=message) as caught:
            refuse_nothing([curated], step=4)
        assert "\n" not in str(caught.value)
        also = curate([rollout(3, (5,))], section(truncated=policy), EOS, [curated])
        refuse_nothing([curated, also], step=4)
        with pytest.raises(DataError, match="step 4: nothing is left"):
            refuse_nothing([curated, also], step=4, also_masked={3})
