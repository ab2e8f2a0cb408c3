"""Which rows a fit sees."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from oprd_megatron.bridge.rows import FitRows, split_rows
from oprd_megatron.config.schema import BridgeConfig, DistillConfig
from oprd_megatron.errors import ConfigError, DataError
from oprd_megatron.representation.batch import Sample, TeacherText

ALL = DistillConfig(positions="all")


def numbered(lengths: list[list[int]]) -> list[list[Sample]]:
    """Batches of responses of these lengths; every response token has an id of its own, from 0."""
    ids, batches = iter(range(10**6)), []
    for batch in lengths:
        batches.append([Sample((9, 9), tuple(next(ids) for _ in range(length))) for length in batch])
    return batches


def drawn_tokens(batches: list[list[Sample]], distill: DistillConfig = ALL) -> list[int]:
    """Ids of the response tokens whose states are used, in order."""
    shift = 1 if distill.position_anchor == "predictor" else 0
    return [sample.ids[at + shift] for batch in batches for sample in batch for at in sample.positions(distill)[1]]


LENGTHS = [[5, 0, 9], [3, 3, 1], [0, 0, 0], [7, 8, 2], [6, 6, 6], [1, 0, 4]]
NUM_TOKENS = 61


def split(rows: int, held_out: float = 0.34, seed: int = 1, distill: DistillConfig = ALL) -> FitRows:
    return split_rows(numbered(LENGTHS), BridgeConfig(rows=rows, held_out=held_out), distill, seed)


def test_whole_batches_are_held_out_and_rows_never_overlap() -> None:
    """The last batches are held out, whole, so that no prompt is on both sides; uncapped, every token is on one side once."""
    rows = split(rows=1000)
    train, held_out = drawn_tokens(rows.train), drawn_tokens(rows.held_out)
    first_held_out = sum(map(sum, LENGTHS[:4]))
    assert train == list(range(first_held_out)) and held_out == list(range(first_held_out, NUM_TOKENS))
    assert (rows.num_train, rows.num_held_out) == (len(train), len(held_out))


@pytest.mark.parametrize("cap", [2, 10, 30])
def test_capped_rows_are_exactly_as_many(cap: int) -> None:
    """count == bridge.rows, each once, ascending, from the training batches alone; the held-out share is capped alike; and
    batches and samples stay whole and in order, as forward passes need them, but for batches without a row."""
    rows = split(rows=cap)
    train, held_out = drawn_tokens(rows.train), drawn_tokens(rows.held_out)
    assert len(train) == rows.num_train == cap
    assert all(a < b for a, b in pairwise(train)) and train[-1] < sum(map(sum, LENGTHS[:4])) <= held_out[0]
    assert len(held_out) == rows.num_held_out == max(1, round(0.34 * cap))
    whole = {batch[0].response_ids + batch[-1].response_ids: batch for batch in numbered(LENGTHS)}
    for batch in rows.train + rows.held_out:
        expected = whole[batch[0].response_ids + batch[-1].response_ids]
        assert [sample.response_ids for sample in batch] == [sample.response_ids for sample in expected]
        assert any(sample.kept for sample in batch)


def test_the_seed_alone_decides() -> None:
    """The same rows again, others with another seed, and other ones from the held-out part than from the training part."""
    first, again, other = (drawn_tokens(split(rows=10, seed=seed).train) for seed in (1, 1, 2))
    assert first == again != other
    twice = numbered([[30], [30]])
    rows = split_rows(twice, BridgeConfig(rows=10, held_out=0.99), ALL, seed=1)
    assert [token - 30 for token in drawn_tokens(rows.held_out)] != drawn_tokens(rows.train)


def test_every_row_is_as_likely() -> None:
    """Of 30 rows 6 are drawn 1,000 times; each comes 200 times but for chance (standard deviation 13; five of them)."""
    counts = np.zeros(30, dtype=int)
    batches = numbered([[12, 0, 1], [17], [5]])
    config = BridgeConfig(rows=6, held_out=0.1)
    for seed in range(1000):
        counts[drawn_tokens(split_rows(batches, config, ALL, seed).train)] += 1
    assert counts.sum() == 6000
    assert np.abs(counts - 200).max() < 63


@pytest.mark.parametrize("anchor", ["token", "predictor"])
def test_rows_are_of_the_supervised_positions(anchor: str) -> None:
    """last_k: only the last two tokens of a response are drawn from; the predictor anchor takes the state one earlier."""
    distill = DistillConfig(positions="last_k", k=2, position_anchor=anchor)  # type: ignore[arg-type]
    batches = numbered(LENGTHS)
    last = [token for batch in batches[:4] for sample in batch for token in sample.response_ids[-2:]]
    rows = split(rows=1000, distill=distill)
    assert drawn_tokens(rows.train, distill) == last
    sample = next(sample for batch in rows.train for sample in batch if len(sample.response_ids) == 9)
    assert list(sample.positions(distill)[1]) == ([9, 10] if anchor == "token" else [8, 9])
    some = drawn_tokens(split(rows=5, distill=distill).train, distill)
    assert len(some) == 5 and set(some) <= set(last)


def test_rows_of_two_tokenizers_stay_pairs() -> None:
    """A drawn row is the same pair of positions on both sides."""
    text = TeacherText(tuple(range(40)), tuple(range(2, 12)), tuple(range(20, 30)))
    batches = [[Sample((9, 9), tuple(range(10)), text)] for _ in range(2)]
    rows = split_rows(batches, BridgeConfig(rows=4, held_out=0.5), ALL, seed=3)
    teacher, student = rows.train[0][0].positions(ALL)
    assert len(student) == 4 and [at + 18 for at in student] == list(teacher)


def test_at_least_one_batch_on_either_side() -> None:
    """However small or large the share is; one batch cannot be split."""
    for share in (0.001, 0.999):
        rows = split(rows=10**6, held_out=share)
        assert rows.num_train and rows.num_held_out and rows.num_train + rows.num_held_out == NUM_TOKENS
    with pytest.raises(ConfigError, match=r"leave nothing to hold out; use at least twice rollout.prompts_per_step$"):
        split_rows(numbered([[4, 4]]), BridgeConfig(), ALL, seed=1)


@pytest.mark.parametrize("lengths", [[[0, 0], [4]], [[4], [0, 0]]])
def test_no_row_on_one_side(lengths: list[list[int]]) -> None:
    """Responses that are all empty are refused in one line."""
    with pytest.raises(DataError, match=r"^bridge: the responses have no supervised token; check [^\n]*$"):
        split_rows(numbered(lengths), BridgeConfig(held_out=0.5), ALL, seed=1)
