"""Gumbel-max sampling: the right distribution, and noise that belongs to the sample alone."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList, StopStringCriteria

from oprd_megatron.rollout import SamplingParams
from oprd_megatron.rollout.sampling import Draw, ResponseEnd, logits_processors, sample_seed
from tests.tiny_models import tiny_tokenizer

CPU = torch.device("cpu")
LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -3.0])
IDS = torch.zeros(1, 1, dtype=torch.int64)


def processors_of(params: SamplingParams, step: int, sample_indices: list[int]) -> LogitsProcessorList:
    return logits_processors(params, Draw(params, step, sample_indices, CPU))


def draws(params: SamplingParams, count: int) -> torch.Tensor:
    """How often each token is drawn from LOGITS, over `count` samples (rows) of one step, `[V]`."""
    processors = processors_of(params, step=3, sample_indices=list(range(count)))
    scores = processors(IDS, LOGITS.repeat(count, 1))
    return torch.bincount(scores.argmax(-1), minlength=len(LOGITS)).double()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_draws_follow_the_tempered_softmax(temperature: float) -> None:
    """Chi-square against softmax(z / T) over 20,000 samples: below the 99.9 % quantile for 5 degrees of freedom."""
    count = 20_000
    observed = draws(SamplingParams(temperature=temperature, seed=11), count)
    expected = (LOGITS / temperature).double().softmax(-1) * count
    assert ((observed - expected) ** 2 / expected).sum() < 20.5


def test_draws_of_one_sample_over_time_follow_the_softmax() -> None:
    """The same holds along one sample: successive tokens are drawn with fresh noise."""
    processors = processors_of(SamplingParams(seed=5), step=0, sample_indices=[0])
    tokens = torch.cat([processors(IDS, LOGITS[None]).argmax(-1) for _ in range(5000)])
    observed, expected = torch.bincount(tokens, minlength=6).double(), LOGITS.double().softmax(-1) * 5000
    assert ((observed - expected) ** 2 / expected).sum() < 20.5


def test_top_p_cuts_the_tail_and_keeps_the_odds() -> None:
    """With p = 0.8 only the smallest set of tokens with that probability is drawn, in proportion."""
    count = 20_000
    observed = draws(SamplingParams(top_p=0.8, seed=2), count)
    # softmax(LOGITS): .545 .200 .074 .027 .122 .004, so .545 + .200 < .8 <= .545 + .200 + .122
    kept = torch.tensor([0, 1, 4])
    assert observed[kept].sum() == count
    expected = LOGITS[kept].double().softmax(-1) * count
    assert ((observed[kept] - expected) ** 2 / expected).sum() < 13.8  # 99.9 % quantile for 2 degrees of freedom


def test_top_p_is_taken_after_temperature() -> None:
    """A high temperature flattens the distribution first, so the same p keeps more tokens."""
    assert (draws(SamplingParams(temperature=5.0, top_p=0.8, seed=2), 2000) > 0).sum() > 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_beyond_the_limit_are_never_written(temperature: float) -> None:
    """Neither sampled nor greedy text holds an id that the other model lacks; the odds of the rest stay."""
    reversed_logits = LOGITS.flip(0)  # the likeliest ids are the last ones
    params = SamplingParams(temperature=temperature, seed=4, vocab_size=3)
    processors = processors_of(params, step=0, sample_indices=list(range(5000)))
    drawn = processors(IDS, reversed_logits.repeat(5000, 1)).argmax(-1)
    assert drawn.max() < 3
    if temperature:
        observed = torch.bincount(drawn, minlength=3).double()
        expected = reversed_logits[:3].double().softmax(-1) * 5000
        assert ((observed - expected) ** 2 / expected).sum() < 13.8  # 99.9 % quantile for 2 degrees of freedom


def test_temperature_zero_leaves_the_logits_alone() -> None:
    """Greedy decoding takes the logits as they are, whatever top_p says."""
    logits = LOGITS[None].clone()
    assert torch.equal(processors_of(SamplingParams(temperature=0, top_p=0.5), 0, [0])(IDS, logits), LOGITS[None])


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("temperature", [0.0, 0.8, 2.0])
def test_a_draws_log_probability_is_of_the_distribution_that_it_is_from(temperature: float, top_p: float) -> None:
    """Of the tokens that generate takes (the argmax), at every step: after limit, temperature and nucleus, before the noise;
    of greedy text untempered. 1e-6: a few roundings of fp32."""
    params = SamplingParams(temperature=temperature, top_p=top_p, seed=3, vocab_size=5)
    draw, count = Draw(params, 2, list(range(300)), CPU), 300
    processors = logits_processors(params, draw)
    rows = [LOGITS.flip(0).repeat(count, 1), LOGITS.repeat(count, 1)]
    drawn = torch.stack([processors(IDS, row).argmax(-1) for row in rows], dim=1)
    for step, row in enumerate(rows):
        probs = (row[0, :5].double() / (temperature or 1)).softmax(-1)
        order = probs.argsort(descending=True)
        before = probs[order].cumsum(0) - probs[order]
        keep = order if temperature == 0 else order[before < top_p]
        expected = torch.full((6,), -torch.inf, dtype=torch.float64)
        expected[keep] = (probs[keep] / probs[keep].sum()).log()
        torch.testing.assert_close(draw.logprobs()[:, step].double(), expected[drawn[:, step]], atol=1e-6, rtol=0)
        assert temperature == 0 or len(drawn[:, step].unique()) > 1
    assert draw.logprobs().max() <= 0


def test_noise_belongs_to_the_sample() -> None:
    """A row's scores are the same alone, in any batch and at any place in it, and differ by seed, step and index."""
    logits = LOGITS.repeat(3, 1)

    def scores(indices: list[int], step: int = 1, seed: int = 1) -> torch.Tensor:
        return processors_of(SamplingParams(seed=seed), step, indices)(IDS, logits[: len(indices)])

    alone = scores([7])[0]
    assert torch.equal(scores([3, 7, 9])[1], alone)
    assert torch.equal(scores([7, 3])[0], alone)
    for other in (scores([8])[0], scores([7], step=2)[0], scores([7], seed=2)[0]):
        assert not torch.equal(other, alone)


def test_seeds_do_not_collide_between_neighbours() -> None:
    """(seed, step, index) triples that a hash by addition would confuse have seeds of their own."""
    seeds = {sample_seed(seed, step, index) for seed in range(8) for step in range(8) for index in range(8)}
    assert len(seeds) == 512
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == 512  # torch's CPU generator keeps only the low 32 bits


def test_the_end_of_a_response_is_its_first() -> None:
    """Later end tokens of a row that goes on being decoded do not move its end; a row without one has none."""
    end = ResponseEnd(num_rows=3, prompt_width=2, eos_ids=torch.tensor([8, 9]), stop_strings=None)
    rows = torch.tensor([[8, 9, 1, 9, 2, 8], [8, 8, 8, 1, 2, 3], [9, 9, 1, 2, 3, 4]])
    states = [end(rows[:, :width], None).tolist() for width in (3, 4, 5, 6)]
    assert states == [[False, True, False], *[[True, True, False]] * 3]
    assert end.lengths.tolist() == [2, 1, 0]


def test_stop_strings_are_looked_for_in_the_response_only() -> None:
    """A stop string may span tokens, but one that begins in the prompt does not count."""
    tokenizer = tiny_tokenizer()
    rows = torch.tensor(tokenizer(["aabcd", "xabcd", "xcabd"])["input_ids"])
    stop_strings = StopStringCriteria(tokenizer, ["ab"])
    end = ResponseEnd(num_rows=3, prompt_width=2, eos_ids=torch.tensor([2]), stop_strings=stop_strings)
    for width in (3, 4, 5):
        end(rows[:, :width], None)
    assert end.lengths.tolist() == [0, 0, 2]
