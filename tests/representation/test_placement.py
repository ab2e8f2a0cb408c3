"""Placement: every supervised token is on the grid once, where the block conventions say it is."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings

from oprd_megatron.parallel import GridLayout
from oprd_megatron.representation.placement import Arrangement, arrange, place_tokens
from tests.grids import CODE, Case, Side, cases

EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True)


def assert_placed(case: Case, side: Side) -> None:
    """The invariants of `TokenPlacement` for one model."""
    tokens, layout, arrangement = side.tokens, side.layout, side.arrangement
    fields = (tokens.dp, tokens.micro_batch, tokens.row, tokens.shard, tokens.local_row)
    assert {array.shape for array in fields} == {(len(case.codes),)}
    assert tokens.replicated == (not layout.sp)
    places = list(zip(*(array.tolist() for array in fields), strict=True))
    assert len({(dp, micro_batch, row) for dp, micro_batch, row, _, _ in places}) == len(places)
    for code, (dp, micro_batch, row, shard, local_row) in zip(case.codes, places, strict=True):
        samples = arrangement.samples[dp][micro_batch]
        position, column = divmod(row, len(samples))
        assert samples[column] * CODE + position == code
        assert position < arrangement.lengths[dp][micro_batch]
        assert 0 <= shard < layout.tp
        assert side.codes(dp, micro_batch, shard).flatten()[local_row] == code
    if not layout.sp:
        shares = Counter((dp, micro_batch, shard) for dp, micro_batch, _, shard, _ in places)
        for dp, micro_batch in {(dp, micro_batch) for dp, micro_batch, *_ in places}:
            sizes = [shares[dp, micro_batch, tp] for tp in range(layout.tp)]
            assert max(sizes) - min(sizes) <= 1, sizes
            here = sorted((row, shard) for d, m, row, shard, _ in places if (d, m) == (dp, micro_batch))
            assert [shard for _, shard in here] == sorted(shard for _, shard in here)


@EXAMPLES
@given(case=cases())
def test_every_supervised_token_is_placed_once(case: Case) -> None:
    """Rows and local rows lead back to the exact (sample, position) on the rank at `shard`; without sequence
    parallelism the shares of the tensor-parallel ranks differ by at most one and are contiguous in the rows."""
    assert_placed(case, case.teacher)
    assert_placed(case, case.student)


@EXAMPLES
@given(case=cases())
def test_arrangement_deals_every_sample_once(case: Case) -> None:
    """Data-parallel ranks have equally many micro-batches of B samples; S is the longest, rounded up for sp only."""
    for side in (case.teacher, case.student):
        arrangement, layout = side.arrangement, side.layout
        dealt = [sample for blocks in arrangement.samples for block in blocks for sample in block]
        assert sorted(dealt) == list(range(len(case.lengths)))
        assert len(arrangement.samples) == len(arrangement.lengths) == layout.dp
        multiple = layout.tp if layout.sp else 1
        for blocks, lengths in zip(arrangement.samples, arrangement.lengths, strict=True):
            assert len(blocks) == len(lengths) == arrangement.num_micro_batches
            for block, length in zip(blocks, lengths, strict=True):
                longest = max(sum(case.lengths[sample]) for sample in block)
                assert len(block) == side.micro_batch_size
                assert length % multiple == 0 and longest <= length < longest + multiple


def test_samples_are_dealt_in_order() -> None:
    """Micro-batches of step i come before those of step i + 1, whatever dp is: the batch order is the global order."""
    layout = GridLayout(1, 1, 2, sp=False, layers_per_stage=(1,))
    found = arrange([3, 4, 5, 6, 9, 8, 7, 1], layout, micro_batch_size=2)
    assert found == Arrangement((((0, 1), (4, 5)), ((2, 3), (6, 7))), ((4, 9), (6, 7)))
    with pytest.raises(AssertionError):
        arrange([1, 2, 3], layout, micro_batch_size=2)


def test_written_out_with_sequence_parallelism() -> None:
    """Two samples of 3 and 5 tokens on tp 2: S is padded to 6, rank 0 holds positions 0-2 and rank 1 positions 3-5."""
    layout = GridLayout(2, 1, 1, sp=True, layers_per_stage=(1,))
    arrangement = arrange([3, 5], layout, micro_batch_size=2)
    assert arrangement.lengths == ((6,),)
    found = place_tokens([[1, 2], [2, 3, 4]], arrangement, layout)
    assert found.row.tolist() == [2, 4, 5, 7, 9]
    assert found.shard.tolist() == [0, 0, 0, 1, 1]
    assert found.local_row.tolist() == [2, 4, 5, 1, 3]
    assert found.dp.tolist() == found.micro_batch.tolist() == [0] * 5
    assert not found.replicated


def test_written_out_without_sequence_parallelism() -> None:
    """The same rollouts on tp 2 without it: the five rows are split 3 and 2, local rows are whole rows."""
    layout = GridLayout(2, 1, 1, sp=False, layers_per_stage=(1,))
    arrangement = arrange([3, 5], layout, micro_batch_size=2)
    found = place_tokens([[1, 2], [2, 3, 4]], arrangement, layout)
    assert arrangement.lengths == ((5,),)
    assert found.row.tolist() == found.local_row.tolist() == [2, 4, 5, 7, 9]
    assert found.shard.tolist() == [0, 0, 0, 1, 1]
    assert found.replicated


def test_a_micro_batch_without_supervised_tokens() -> None:
    """It takes no place; the others are where they would be without it. A batch without any has empty arrays."""
    layout = GridLayout(3, 1, 1, sp=False, layers_per_stage=(1,))
    arrangement = arrange([2, 4, 3], layout, micro_batch_size=1)
    found = place_tokens([[1], [], [0, 2]], arrangement, layout)
    assert found.micro_batch.tolist() == [0, 2, 2]
    assert found.row.tolist() == [1, 0, 2]
    assert place_tokens([[], [], []], arrangement, layout).row.shape == (0,)
    assert found.row.dtype == np.int64
