"""Distance between the policy that wrote and the one that is trained: formulas against sums over the whole vocabulary."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from oprd_megatron.config.rollout import MismatchConfig
from oprd_megatron.errors import MismatchError, UserError
from oprd_megatron.rollout import Rollout
from oprd_megatron.rollout.mismatch import Mismatch, compare, effective_sample_size, engine_logprobs


def random_logprobs(lengths: list[int], seed: int, scale: float = 0.3) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    engine = [-torch.rand(length, generator=generator) - 2 for length in lengths]
    return engine, [values + scale * torch.randn(len(values), generator=generator) for values in engine]


def test_figures_are_the_formulas() -> None:
    """Against plain Python sums in double precision, for a step of uneven responses; 1e-12 is rounding."""
    engine, trainer = random_logprobs([5, 1, 9], seed=0)
    found = compare([4, 0, 7], engine, trainer)
    by_index = {}
    for index, theirs, mine in zip([4, 0, 7], engine, trainer, strict=True):
        by_index[index] = [p - q for p, q in zip(theirs.tolist(), mine.tolist(), strict=True)]
    every = [delta for deltas in by_index.values() for delta in deltas]
    for distance, deltas in [(found.whole, every), *((found.responses[index], by_index[index]) for index in by_index)]:
        assert distance.mean_abs == pytest.approx(sum(map(abs, deltas)) / len(deltas), rel=1e-12)
        assert distance.max_abs == max(map(abs, deltas))
        assert distance.mean == pytest.approx(sum(deltas) / len(deltas), rel=1e-12)
        assert distance.token_ess == pytest.approx(ess([math.exp(-delta) for delta in deltas]), rel=1e-12)
    products = [math.exp(-sum(deltas)) for deltas in by_index.values()]
    assert found.sequence_ess == pytest.approx(ess(products), rel=1e-12)
    assert list(found.responses) == [4, 0, 7]
    assert found.record() == {
        "mean_abs": found.whole.mean_abs, "max_abs": found.whole.max_abs, "kl": found.whole.mean,
        "worst_response": max(distance.mean_abs for distance in found.responses.values()),
        "token_ess": found.whole.token_ess, "sequence_ess": found.sequence_ess,
    }  # fmt: skip


def ess(weights: list[float]) -> float:
    """(sum w)^2 / (n sum w^2), exactly."""
    exact = [Fraction(weight) for weight in weights]
    return float(sum(exact) ** 2 / (len(exact) * sum(weight**2 for weight in exact)))


def test_two_known_policies() -> None:
    """Tokens drawn from p: the mean of delta tends to KL(p || q), the tokens' effective sample size to 1 / sum q^2 / p, and the
    mean of |delta| to sum p |log p - log q|. 200,000 draws: four standard errors."""
    generator = torch.Generator().manual_seed(1)
    p, q = (torch.randn(12, generator=generator).double().softmax(-1) for _ in range(2))
    log_p, log_q, count = p.log(), q.log(), 200_000
    drawn = torch.multinomial(p, count, replacement=True, generator=generator)
    found = compare([0], [log_p[drawn]], [log_q[drawn]]).whole

    def check(value: float, of_token: torch.Tensor) -> None:
        mean = float((p * of_token).sum())
        error = math.sqrt(float((p * (of_token - mean) ** 2).sum()) / count)
        assert abs(value - mean) < 4 * error

    check(found.mean, log_p - log_q)
    check(found.mean_abs, (log_p - log_q).abs())
    assert float((p * (log_p - log_q)).sum()) > 0.3  # and KL(q || p) is another number
    assert abs(float((q * (log_q - log_p)).sum()) - found.mean) > 0.05
    assert found.token_ess == pytest.approx(1 / float((q * q / p).sum()), rel=0.05)


def test_equal_policies_are_at_distance_0() -> None:
    """All differences 0, all effective sample sizes 1, exactly."""
    engine, _ = random_logprobs([3, 4], seed=2)
    found = compare([0, 1], engine, [values.clone() for values in engine])
    for distance in (found.whole, *found.responses.values()):
        assert (distance.mean_abs, distance.max_abs, distance.mean, distance.token_ess) == (0, 0, 0, 1)
    assert found.sequence_ess == 1


def test_weights_that_no_float_holds() -> None:
    """Products over 10,000 tokens, exp(+-5000): one response is all there is, or, with equal products, all count."""
    base = torch.full((10_000,), -3.0)
    above, below = base + 0.5, base - 0.5
    found = compare([0, 1, 2], [base, base, base], [above, below, below])
    assert found.sequence_ess == pytest.approx(1 / 3, rel=1e-12)
    assert compare([0, 1, 2], [base] * 3, [above] * 3).sequence_ess == 1
    assert compare([0, 1, 2], [base] * 3, [below] * 3).sequence_ess == 1
    assert effective_sample_size(torch.tensor([-1e6, 1e6], dtype=torch.float64)) == 0.5


def test_fp32_differences_are_taken_in_double_precision() -> None:
    """A sum of 40,000 equal differences of 2^-24 near -1 is exact; in fp32 sums it would not be."""
    engine = torch.full((40_001,), -1.0)
    trainer = engine + torch.tensor(2.0**-24)
    assert trainer[0] != -1.0
    whole = compare([0], [engine], [trainer]).whole
    assert whole.mean == -(2.0**-24) and whole.mean_abs == 2.0**-24


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("whose", ["engine", "trainer"])
def test_log_probabilities_that_are_none_name_the_sample(whose: str, bad: float) -> None:
    """Whose, which sample, which token: one line."""
    engine, trainer = random_logprobs([3, 4], seed=3)
    (engine if whose == "engine" else trainer)[1][2] = bad
    with pytest.raises(
        MismatchError, match=f"sample 9: the {whose}'s log-probability of response token 2 is {bad};"
    ) as caught:
        compare([5, 9], engine, trainer)
    assert "\n" not in str(caught.value) and isinstance(caught.value, UserError)


def measured() -> Mismatch:
    """Samples 3, 5, 8 at 0.25, 0.5 and 2 nats a token."""
    base = torch.full((4,), -4.0)
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0])
    return compare([3, 5, 8], [base] * 3, [base + size * signs for size in (0.25, 0.5, 2.0)])


def test_the_gate() -> None:
    """Responses above the limit (a response at it is not) are let through, masked, or stop the run with the worst named."""
    found = measured()
    for gate, limit, masked in (("none", 0.1, set()), ("mask", 0.5, {8}), ("mask", 0.4, {5, 8}), ("mask", 3, set()),
                                ("stop", 2, set())):  # fmt: skip
        assert found.gate(MismatchConfig(gate=gate, limit=limit), step=6) == masked
    message = r"step 6: .* of 2 of 3 responses are further than rollout\.mismatch\.limit 0\.4 .*, sample 8 by 2 nats a token; "
    with pytest.raises(MismatchError, match=message) as caught:
        found.gate(MismatchConfig(gate="stop", limit=0.4), step=6)
    assert "\n" not in str(caught.value)


def test_an_engine_must_have_spoken() -> None:
    """As many as tokens, else the sample is named; what it said is passed on as it is."""
    good = Rollout(0, 4, (1,), (5, 6), 0, True, (-0.5, -0.25))
    assert [values.tolist() for values in engine_logprobs([good, good])] == [[-0.5, -0.25]] * 2
    for logprobs in (None, (-0.5,)):
        silent = Rollout(0, 7, (1,), (5, 6), 0, True, logprobs)
        with pytest.raises(MismatchError, match=r"sample 7 has [01] log-probabilities for 2 tokens"):
            engine_logprobs([good, silent])
