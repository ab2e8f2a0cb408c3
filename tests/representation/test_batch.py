"""Planning a batch: chunks under the budget, and micro-batches by tokens."""

from __future__ import annotations

import itertools
import math
import random
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd_megatron.errors import ConfigError, DataError
from oprd_megatron.parallel import GridLayout
from oprd_megatron.representation.batch import OVERLAP_CHUNKS, Planner, Sample
from oprd_megatron.representation.placement import arrange
from tests.grids import Case, cases, grid, layouts, random_case

EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True)
STATE_BYTES, OUTPUT_BYTES = 10, 6


@st.composite
def batches(draw: st.DrawFn) -> Case:
    """Both models on the same or on disjoint ranks, with the same micro-batch size and a few whole units of rollouts; of half
    of them the teacher's predictions travel too."""
    rng = draw(st.randoms(use_true_random=False))
    case = random_case(rng, 12, ("same", "disjoint"))
    size = rng.randint(1, 2)
    case = replace(case, micro_batch_sizes=(size, size), output_bytes=rng.choice([0, OUTPUT_BYTES]))
    count = unit(case.planner(STATE_BYTES)) * rng.randint(1, 12)
    return replace(case, lengths=[(2, 3)] + [(rng.randint(0, 5), rng.randint(0, 6)) for _ in range(count - 1)])


def unit(planner: Planner) -> int:
    """Rollouts that both grids can deal evenly."""
    if planner.micro_batch_tokens is not None:
        return 1
    return math.lcm(planner.micro_batch_size * planner.teacher.dp, planner.micro_batch_size * planner.student.dp)


def least_budget(case: Case) -> int:
    """The number that the planner names to a budget that is too small."""
    with pytest.raises(ConfigError) as caught:
        case.planner(STATE_BYTES, spool_bytes=1).plan(case.samples)
    text = str(caught.value)
    found = re.fullmatch(r"distill\.spool_bytes: 1 is below .+ needs at least (\d+)", text)
    assert found and "\n" not in text, text
    return int(found[1])


def largest_chunk(planner: Planner, case: Case) -> int:
    """Most bytes that a rank holds of a chunk."""
    chunks = planner.plan(case.samples).chunks
    return max(size for chunk in chunks for size in chunk.held_bytes(STATE_BYTES, case.output_bytes).values())


@EXAMPLES
@given(case=batches(), share=st.floats(0, 1))
def test_chunks_are_the_batch_in_order(case: Case, share: float) -> None:
    """Whatever the budget, the chunks are the samples in order, each of whole units; the loss's denominator is that of the
    whole batch; and both sides of a chunk are arranged and placed as its samples alone would be. What ranks hold of it, and
    what travels, are its states and the predictions that are looked at."""
    least = least_budget(case)
    for budget in (None, least, least + int(share * STATE_BYTES * 100)):
        planner = case.planner(STATE_BYTES, spool_bytes=budget)
        plan = planner.plan(case.samples)
        assert list(itertools.chain(*(chunk.samples for chunk in plan.chunks))) == case.samples
        assert plan.num_tokens == len(case.codes) == sum(len(chunk.route.order) for chunk in plan.chunks)
        for chunk in plan.chunks:
            assert len(chunk.samples) % unit(planner) == 0 < len(chunk.samples)
            alone = replace(case, lengths=[(len(s.prompt_ids), len(s.response_ids)) for s in chunk.samples])
            assert chunk.teacher.arrangement == alone.teacher.arrangement
            assert chunk.student.arrangement == alone.student.arrangement
            assert chunk.route.order.tolist() == alone.route.order.tolist()
            assert chunk.held_bytes(STATE_BYTES, case.output_bytes) == alone.held_bytes(STATE_BYTES)
            lacking = [sum(map(part.lacking, case.student_layout.ranks)) for part in (alone, alone.outputs)]
            total = lacking[0] * STATE_BYTES + lacking[1] * case.output_bytes
            assert chunk.total_bytes(STATE_BYTES, case.output_bytes) == total


@EXAMPLES
@given(case=batches(), share=st.floats(0, 1))
def test_chunks_fit_the_budget(case: Case, share: float) -> None:
    """No rank holds more of a chunk than the budget. On disjoint ranks it is half the budget, so that two chunks overlap,
    unless the chunks cannot be smaller."""
    least = least_budget(case)
    budget = least + int(share * STATE_BYTES * 100)
    planner = case.planner(STATE_BYTES, spool_bytes=budget)
    largest, count = largest_chunk(planner, case), len(planner.plan(case.samples).chunks)
    assert largest <= budget
    if case.teacher_layout.ranks != case.student_layout.ranks and count < len(case.lengths) // unit(planner):
        assert 2 * largest <= budget


@EXAMPLES
@given(case=batches())
def test_the_least_budget_works_and_is_the_least(case: Case) -> None:
    """The number that the error names works. With micro-batches of a fixed size one byte less does not (by tokens it may: how
    samples are dealt depends on the chunk)."""
    least = least_budget(case)
    assert largest_chunk(case.planner(STATE_BYTES, spool_bytes=least), case) <= least
    if case.micro_batch_tokens is None and least > 1:
        with pytest.raises(ConfigError, match=f"needs at least {least}$"):
            case.planner(STATE_BYTES, spool_bytes=least - 1).plan(case.samples)


@EXAMPLES
@given(case=batches())
def test_without_a_budget_chunks_only_overlap(case: Case) -> None:
    """On the same ranks a batch is one chunk. On disjoint ranks it is several, but never so many that a chunk could not fill
    the deeper pipeline."""
    planner = case.planner(STATE_BYTES)
    plan, units = planner.plan(case.samples), len(case.lengths) // unit(planner)
    deepest = max(layout.pp * layout.vpp for layout in (case.teacher_layout, case.student_layout))
    if case.teacher_layout.ranks == case.student_layout.ranks:
        assert len(plan.chunks) == 1
    elif units >= 2 * deepest:
        assert 1 < len(plan.chunks) <= OVERLAP_CHUNKS
        assert all(len(chunk.samples) >= deepest * unit(planner) for chunk in plan.chunks)
    else:
        assert len(plan.chunks) == 1


def test_a_batch_without_supervised_tokens() -> None:
    """All responses empty: there is nothing to learn from, and the message says so."""
    layout = grid(1, 1, 1, (2,))
    case = Case([(3, 0), (2, 0)], layout, layout)
    with pytest.raises(DataError, match="no token of this batch is supervised") as caught:
        case.planner(STATE_BYTES).plan(case.samples)
    assert "\n" not in str(caught.value)


def test_samples_that_cannot_be_dealt_are_not_dropped() -> None:
    """Five rollouts, two at a time: a defect of the caller, not a batch of four."""
    layout = grid(1, 1, 1, (2,))
    case = Case([(1, 1)] * 5, layout, layout, (2, 2))
    with pytest.raises(AssertionError, match="5 samples"):
        case.planner(STATE_BYTES).plan(case.samples)


def test_written_out() -> None:
    """One rank, four rollouts of 3, 1, 2, 2 tokens, two layers of 10 bytes a state: 160 bytes in all. 100 bytes take two chunks
    (80, 80), 60 take three or four with the largest rollout alone (60), and 59 do not work."""
    layout = grid(1, 1, 1, (2,))
    case = Case([(1, 3), (1, 1), (1, 2), (1, 2)], layout, layout)

    def sizes(budget: int | None) -> list[int]:
        plan = case.planner(STATE_BYTES, spool_bytes=budget).plan(case.samples)
        return [chunk.route.held_bytes(STATE_BYTES)[0] for chunk in plan.chunks]

    assert sizes(None) == sizes(160) == [160]
    assert sizes(159) == sizes(100) == [80, 80]
    assert sizes(60) == [60, 60, 40] or sizes(60) == [60, 20, 40, 40]
    with pytest.raises(ConfigError, match=r"spool_bytes: 59 is below .* needs at least 60$"):
        sizes(59)


def test_outputs_written_out() -> None:
    """The same batch with 6 bytes of each of 8 predictions: 16 states and 48 bytes more. Without anything of the teacher's to
    travel the tokens are there all the same, and no bytes."""
    layout = grid(1, 1, 1, (2,))
    case = Case([(1, 3), (1, 1), (1, 2), (1, 2)], layout, layout, output_bytes=6)
    (chunk,) = case.planner(STATE_BYTES).plan(case.samples).chunks
    assert chunk.held_bytes(STATE_BYTES, 6) == {0: 160 + 48} and chunk.total_bytes(STATE_BYTES, 6) == 0
    plan = case.planner(STATE_BYTES, spool_bytes=160).plan(case.samples)
    assert [part.held_bytes(STATE_BYTES, 6)[0] for part in plan.chunks] == [104, 104]
    silent = replace(case.planner(STATE_BYTES), output_bytes=0).plan(case.samples).chunks[0]
    assert silent.outputs is not None and silent.outputs.route is None and len(silent.outputs.targets) == 8
    assert silent.held_bytes(STATE_BYTES, 0) == {0: 160}
    assert Case(case.lengths, layout, layout).planner(STATE_BYTES).plan(case.samples).chunks[0].outputs is None


@EXAMPLES
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    layout=layouts(),
    most=st.integers(1, 120),
)
def test_micro_batches_by_tokens(lengths: list[int], layout: GridLayout, most: int) -> None:
    """Every sample once; no micro-batch above the limit but a single sample; equally many on all data-parallel ranks, a
    multiple of pp under virtual stages; and the ranks' tokens differ by no more than the longest sample."""
    packs = arrange(lengths, layout, 1, most).packs
    dealt = sorted(sample for row in packs for pack in row for sample in pack.samples)
    assert dealt == list(range(len(lengths)))
    for pack in itertools.chain(*packs):
        assert len(pack.samples) <= 1 or sum(lengths[sample] for sample in pack.samples) <= most
        assert list(pack.samples) == sorted(pack.samples)
    assert len(packs) == layout.dp and len({len(row) for row in packs}) == 1
    assert layout.vpp == 1 or len(packs[0]) % layout.pp == 0
    tokens = [sum(lengths[sample] for pack in row for sample in pack.samples) for row in packs]
    assert max(tokens) - min(tokens) <= max(lengths)


@EXAMPLES
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), dp=st.integers(1, 3), most=st.integers(40, 200))
def test_micro_batches_by_tokens_are_few(lengths: list[int], dp: int, most: int) -> None:
    """Where every sample fits, there are hardly more micro-batches than the tokens need: Graham's rule keeps them within
    a sample of the mean, so it never takes more than would hold `most - longest` each."""
    packs = arrange(lengths, grid(1, 1, dp, (1,)), 1, most).packs
    room = most - max(lengths)
    if room:
        assert len(packs[0]) <= math.ceil(math.ceil(sum(lengths) / room) / dp)


def test_micro_batches_by_tokens_written_out() -> None:
    """Seven samples of 8, 7, 6, 5, 4, 2, 1 tokens, at most 12 at a time, on two ranks: four micro-batches of 8 or 9 tokens, the
    fullest dealt first and back and forth."""
    packs = arrange([8, 1, 6, 5, 4, 2, 7], grid(1, 1, 2, (1,)), 1, 12).packs
    assert [[pack.samples for pack in row] for row in packs] == [[(3, 4), (2, 5)], [(0,), (1, 6)]]


@EXAMPLES
@given(case=cases())
def test_arranging_is_the_same_on_every_rank(case: Case) -> None:
    """Ranks do not talk about it, so the same input must give the same arrangement, ties included."""
    lengths = [prompt + response for prompt, response in case.lengths]
    again = [arrange(list(lengths), replace(side.layout), size, case.micro_batch_tokens)
             for side, size in zip((case.teacher, case.student), case.micro_batch_sizes, strict=True)]  # fmt: skip
    assert again == [case.teacher.arrangement, case.student.arrangement]


def test_a_large_batch_is_arranged_in_no_time() -> None:
    """4,096 rollouts by tokens over 64 data-parallel ranks: the search for a number of micro-batches does not crawl."""
    rng = random.Random(0)
    lengths = [rng.randint(50, 8000) for _ in range(4096)]
    packs = arrange(lengths, grid(1, 1, 64, (1,)), 1, 8192).packs
    assert sum(len(pack.samples) for row in packs for pack in row) == len(lengths)


@EXAMPLES
@given(case=batches())
def test_the_bound_always_works(case: Case) -> None:
    """With the bound made from the longest sample alone, no batch of samples up to that length is ever refused."""
    longest = Sample((0,) * 5, (0,) * 6)
    bound = case.planner(STATE_BYTES).most_held_bytes(longest)
    planner = case.planner(STATE_BYTES, spool_bytes=bound)
    assert largest_chunk(planner, case) <= bound
