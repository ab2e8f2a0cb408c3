"""The prompt order is a function of (seed, step)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from oprd_megatron.rollout import Prompt, PromptSource, make_requests, prompt_order

sizes = st.integers(1, 20)


def source(num_prompts: int, seed: int = 0) -> PromptSource:
    return PromptSource([Prompt(index, str(index), (index,)) for index in range(num_prompts)], seed)


@given(num_prompts=sizes, per_step=sizes, seed=st.integers(0, 2**31))
def test_every_epoch_holds_every_prompt_once(num_prompts: int, per_step: int, seed: int) -> None:
    """The batches of all steps, laid end to end, are permutations of the prompts, whatever the batch size."""
    steps = 3 * num_prompts // per_step + 1
    stream = [p.index for step in range(steps) for p in source(num_prompts, seed).batch(step, per_step)]
    for start in range(0, len(stream) - num_prompts + 1, num_prompts):
        assert sorted(stream[start : start + num_prompts]) == list(range(num_prompts))


@given(num_prompts=sizes, per_step=sizes, step=st.integers(0, 1000))
def test_a_step_needs_no_history(num_prompts: int, per_step: int, step: int) -> None:
    """A fresh source, asked for a late step only, gives what a source that went through earlier steps gives."""
    used = source(num_prompts)
    for earlier in range(min(step, 5)):
        used.batch(earlier, per_step)
    assert used.batch(step, per_step) == source(num_prompts).batch(step, per_step)


def test_order_changes_with_seed_and_epoch_only() -> None:
    """Other seeds and other epochs give other orders; the same arguments give the same order, here and next year."""
    assert prompt_order(50, 1, 0) != prompt_order(50, 2, 0)
    assert prompt_order(50, 1, 0) != prompt_order(50, 1, 1)
    assert prompt_order(8, 1234, 0) == ORDER_OF_SEED_1234


ORDER_OF_SEED_1234 = (5, 6, 7, 0, 4, 1, 3, 2)


def test_requests_count_samples_over_the_step() -> None:
    """Responses of one prompt are neighbours and sample indices count up from 0, also when a prompt comes twice."""
    prompts = source(2).batch(0, 2)
    requests = make_requests([prompts[0], prompts[1], prompts[0]], 2)
    assert [request.sample_index for request in requests] == [0, 1, 2, 3, 4, 5]
    expected = [prompts[i].index for i in (0, 0, 1, 1, 0, 0)]
    assert [request.prompt.index for request in requests] == expected
