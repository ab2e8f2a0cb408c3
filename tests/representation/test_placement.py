"""Placement: every supervised token is on the grid once, where the conventions of packs say it is."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from oprd_megatron.parallel.grid import Grid
from oprd_megatron.representation.batch import Sample
from oprd_megatron.representation.feed import PAD_ID, micro_batches
from oprd_megatron.representation.placement import Arrangement, Pack, arrange, place_tokens, shard_of_pack
from tests.grids import CODE, FILL, Case, Side, cases, grid, places

EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True)


def assert_placed(case: Case, side: Side) -> None:
    """The invariants of `TokenPlacement` for one model."""
    tokens, layout = side.tokens, side.layout
    fields = (tokens.dp, tokens.cp, tokens.micro_batch, tokens.row, tokens.shard, tokens.local_row)
    assert {array.shape for array in fields} == {(len(case.codes),)}
    assert tokens.replicated == (not layout.sp)
    found = list(zip(*(array.tolist() for array in fields), strict=True))
    assert len({(dp, micro_batch, row) for dp, _, micro_batch, row, _, _ in found}) == len(found)
    blocks = {(c.dp, c.cp, c.tp, mb): side.codes(c, mb) for c in places(layout) if c.pp == 0
              for mb in range(side.arrangement.num_micro_batches)}  # fmt: skip
    for code, (dp, cp, micro_batch, row, shard, local_row) in zip(case.codes, found, strict=True):
        assert list(itertools.chain(*side.segments(dp, micro_batch)))[row] == code
        assert blocks[dp, cp, shard, micro_batch][local_row] == code
    if not layout.sp:
        shares = defaultdict(list)
        for dp, cp, micro_batch, row, shard, _ in found:
            shares[dp, cp, micro_batch].append((row, shard))
        for here in shares.values():
            ranks = [shard for _, shard in sorted(here)]
            assert ranks == sorted(ranks)
            sizes = [ranks.count(tp) for tp in range(layout.tp)]
            assert max(sizes) - min(sizes) <= 1, sizes


@EXAMPLES
@given(case=cases())
def test_every_supervised_token_is_placed_once(case: Case) -> None:
    """Rows and local rows lead back to the exact (sample, position) on the rank at `cp`, `shard`; without sequence
    parallelism the shares of the tensor-parallel ranks differ by at most one and are contiguous in the rows."""
    assert_placed(case, case.teacher)
    assert_placed(case, case.student)


@EXAMPLES
@given(case=cases())
def test_arrangement_deals_every_sample_once(case: Case) -> None:
    """Data-parallel ranks have equally many micro-batches, a multiple of pp under virtual stages; spans hold their samples
    with no more fill than 2 * cp asks for, and packs no more than both parallelisms together."""
    for side, size in zip((case.teacher, case.student), case.micro_batch_sizes, strict=True):
        arrangement, layout = side.arrangement, side.layout
        dealt = [sample for packs in arrangement.packs for pack in packs for sample in pack.samples]
        assert sorted(dealt) == list(range(len(case.lengths)))
        assert [len(packs) for packs in arrangement.packs] == [arrangement.num_micro_batches] * layout.dp
        assert layout.vpp == 1 or arrangement.num_micro_batches % layout.pp == 0
        share = 2 * layout.cp if layout.cp > 1 else 1
        whole = math.lcm(share, layout.cp * (layout.tp if layout.sp else 1))
        for pack in itertools.chain(*arrangement.packs):
            if case.micro_batch_tokens is None:
                assert len(pack.samples) in (size, 0)
            spans = pack.spans[: len(pack.samples)]
            for sample, span in zip(pack.samples, spans, strict=True):
                assert span % share == 0 and 0 <= span - max(1, side.lengths[sample]) < share
            assert pack.length % whole == 0 and 0 <= pack.length - max(1, sum(spans)) < whole
            assert pack.boundaries[-1] == pack.length and (np.diff(pack.boundaries) > 0).all()


@EXAMPLES
@given(case=cases())
def test_ranks_are_fed_what_lies_on_them(case: Case) -> None:
    """`feed.micro_batches` gives every rank the tokens of its block (before sequence parallelism, which is the model's own
    doing), the same boundaries on all context-parallel ranks, and PAD_ID where there is no token."""
    for side in (case.teacher, case.student):
        unsplit = Side(replace(side.layout, sp=False), side.lengths, side.arrangement, side.tokens)
        for coords in places(side.layout):
            if coords.tp:
                continue
            fed = micro_batches(
                [sample.ids for sample in numbered(side)],
                side.arrangement,
                Grid(side.layout, side.layout.rank(coords), None),
            )
            assert [batch.number for batch in fed] == list(range(side.arrangement.num_micro_batches))
            for batch in fed:
                expected = unsplit.codes(coords, batch.number)
                if side.layout.sp:  # the tail of a pack is filled up for tp too
                    shares = [side.codes(at, batch.number) for at in places(side.layout)
                              if (at.dp, at.pp, at.cp) == (coords.dp, coords.pp, coords.cp)]  # fmt: skip
                    expected = np.concatenate(shares)
                assert batch.ids.tolist() == [PAD_ID if code == FILL else code + 1 for code in expected]
                assert batch.boundaries == side.arrangement.packs[coords.dp][batch.number].boundaries


def numbered(side: Side) -> list[Sample]:
    """Samples whose token ids are their codes plus one."""
    return [Sample(tuple(sample * CODE + position + 1 for position in range(length)), ())
            for sample, length in enumerate(side.lengths)]  # fmt: skip


def test_samples_are_dealt_in_order() -> None:
    """Each data-parallel rank has a contiguous part of the batch, so that a rank of dp 4 has a part of what one of dp 2 has."""
    found = arrange([3, 4, 5, 6, 9, 8, 7, 1], grid(1, 1, 2, (1,)), micro_batch_size=2)
    assert [[pack.samples for pack in packs] for packs in found.packs] == [[(0, 1), (2, 3)], [(4, 5), (6, 7)]]
    assert [[pack.spans for pack in packs] for packs in found.packs] == [[(3, 4), (5, 6)], [(9, 8), (7, 1)]]
    with pytest.raises(AssertionError):
        arrange([1, 2, 3], grid(1, 1, 2, (1,)), micro_batch_size=2)


def test_fillers_round_micro_batches_up_for_virtual_stages() -> None:
    """Three micro-batches on pp 2 x vpp 2 become four: the last holds no sample and takes up one token."""
    found = arrange([3, 4, 5], grid(1, 2, 1, (1, 1, 1, 1), vpp=2), micro_batch_size=1)
    assert found == Arrangement(((Pack((0,), (3,)), Pack((1,), (4,)), Pack((2,), (5,)), Pack((), (1,))),))


def test_written_out_with_sequence_parallelism() -> None:
    """Samples of 3 and 5 tokens on tp 3 make a pack of 8 + 1: rank 0 holds rows 0-2, rank 1 rows 3-5, rank 2 rows 6-8."""
    layout = grid(3, 1, 1, (1,), sp=True)
    arrangement = arrange([3, 5], layout, micro_batch_size=2)
    assert arrangement.packs == ((Pack((0, 1), (3, 5, 1)),),)
    found = place_tokens([[1, 2], [2, 3, 4]], arrangement, layout)
    assert found.row.tolist() == [1, 2, 5, 6, 7]
    assert found.shard.tolist() == [0, 0, 1, 2, 2]
    assert found.local_row.tolist() == [1, 2, 2, 0, 1]
    assert found.dp.tolist() == found.cp.tolist() == found.micro_batch.tolist() == [0] * 5
    assert not found.replicated


def test_written_out_without_sequence_parallelism() -> None:
    """The same rollouts on tp 2 without it: the five rows are split 3 and 2, local rows are whole rows."""
    layout = grid(2, 1, 1, (1,))
    arrangement = arrange([3, 5], layout, micro_batch_size=2)
    found = place_tokens([[1, 2], [2, 3, 4]], arrangement, layout)
    assert arrangement.packs == ((Pack((0, 1), (3, 5)),),)
    assert found.row.tolist() == found.local_row.tolist() == [1, 2, 5, 6, 7]
    assert found.shard.tolist() == [0, 0, 0, 1, 1]
    assert found.replicated


def test_written_out_with_context_parallelism() -> None:
    """Samples of 3 and 8 tokens on cp 2: spans of 4 and 8 in four parts each; rank 0 has the first and the last part of both,
    rank 1 the two in the middle. So rank 0 holds rows 0 3 | 4 5 10 11 of the pack, rank 1 rows 1 2 | 6 7 8 9."""
    layout = grid(1, 1, 1, (1,), cp=2)
    arrangement = arrange([3, 8], layout, micro_batch_size=2)
    (pack,) = arrangement.packs[0]
    assert pack == Pack((0, 1), (4, 8)) and pack.boundaries == [0, 4, 12]
    rows = np.arange(12)
    assert shard_of_pack(rows, pack, 0, 2).tolist() == [0, 3, 4, 5, 10, 11]
    assert shard_of_pack(rows, pack, 1, 2).tolist() == [1, 2, 6, 7, 8, 9]
    found = place_tokens([[0, 2], [1, 4, 6, 7]], arrangement, layout)
    assert found.row.tolist() == [0, 2, 5, 8, 10, 11]
    assert found.cp.tolist() == [0, 1, 0, 1, 0, 0]
    assert found.local_row.tolist() == [0, 1, 3, 4, 4, 5]


def test_context_and_sequence_parallelism_together() -> None:
    """The second pack above on cp 2 x tp 3 with sp: 4 + 8 tokens are a multiple of 6; six rows of a cp rank in three pairs."""
    layout = grid(3, 1, 1, (1,), cp=2, sp=True)
    arrangement = arrange([3, 8], layout, micro_batch_size=2)
    found = place_tokens([[0, 2], [1, 4, 6, 7]], arrangement, layout)
    assert found.cp.tolist() == [0, 1, 0, 1, 0, 0]
    assert found.shard.tolist() == [0, 0, 1, 2, 2, 2]
    assert found.local_row.tolist() == [0, 1, 1, 0, 0, 1]


def test_a_micro_batch_without_supervised_tokens() -> None:
    """It takes no place; the others are where they would be without it. A batch without any has empty arrays."""
    layout = grid(3, 1, 1, (1,))
    arrangement = arrange([2, 4, 3], layout, micro_batch_size=1)
    found = place_tokens([[1], [], [0, 2]], arrangement, layout)
    assert found.micro_batch.tolist() == [0, 2, 2]
    assert found.row.tolist() == [1, 0, 2]
    assert place_tokens([[], [], []], arrangement, layout).row.shape == (0,)
    assert found.row.dtype == np.int64


@EXAMPLES
@given(case=cases())
def test_context_parallel_ranks_share_causal_attention_evenly(case: Case) -> None:
    """Of every sample, cp ranks hold equally many places, and equally many (query, key) pairs under the causal mask."""
    for side in (case.teacher, case.student):
        layout = side.layout
        if layout.cp == 1:
            continue
        for pack in itertools.chain(*side.arrangement.packs):
            whole = np.concatenate([np.arange(span) for span in pack.spans])
            owner = np.repeat(np.arange(len(pack.spans)), pack.spans)
            work = []
            for cp in range(layout.cp):
                rows = shard_of_pack(np.arange(pack.length), pack, cp, layout.cp)
                keys: Counter[int] = Counter()
                for row in rows.tolist():
                    keys[owner[row]] += whole[row] + 1
                work.append((np.bincount(owner[rows]).tolist(), keys))
            assert all(share == work[0] for share in work)


def test_nested_data_parallelism_keeps_states_in_place() -> None:
    """A teacher of tp 4, dp 2 and a student of tp 2, dp 4 on the same ranks: a student rank's samples are its teacher rank's,
    and as the teacher's states are replicated, nothing travels."""
    case = Case([(2, 5)] * 8, grid(4, 1, 2, (3,)), grid(2, 1, 4, (3,)))
    assert len(case.route.source) and case.route.total_bytes(4) == 0
