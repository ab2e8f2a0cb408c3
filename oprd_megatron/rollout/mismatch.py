"""How far the policy that wrote the text is from the one that is trained: the engine's log-probabilities against the trainer's.

For response token y_t with p the engine's distribution (which it was drawn from) and q the trainer's:

    delta_t = log p(y_t) - log q(y_t)          its mean over drawn tokens estimates KL(p || q)
    w_t     = q(y_t) / p(y_t) = exp(-delta_t)  importance weight of a token
    w       = product of w_t = exp(-sum delta) importance weight of a response
    ESS     = (sum w)^2 / (n sum w^2)          1 for equal policies; 1/n where one weight is all there is

Both are of the same distribution only if the trainer's logits are divided by the temperature and limited to the same ids.
Everything in float64, weights relative to the largest one, so that nothing overflows.

Legend: L tokens of a response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from oprd_megatron.config.rollout import MismatchConfig
from oprd_megatron.errors import MismatchError
from oprd_megatron.rollout.engine import Rollout


@dataclass(frozen=True)
class Distance:
    """Of some tokens, in nats.

    Attributes:
        mean_abs, max_abs, mean: of delta.
        token_ess: effective sample size of the tokens' weights, normalised.
    """

    mean_abs: float
    max_abs: float
    mean: float
    token_ess: float

    @classmethod
    def of(cls, delta: torch.Tensor) -> Distance:
        """Args: delta [N] float64, N > 0."""
        size = delta.abs()
        return cls(float(size.mean()), float(size.max()), float(delta.mean()), effective_sample_size(-delta))


@dataclass(frozen=True)
class Mismatch:
    """A step's.

    Attributes:
        whole: over all tokens.
        responses: {sample index: over its tokens}.
        sequence_ess: effective sample size of the responses' weights, normalised.
    """

    whole: Distance
    responses: dict[int, Distance]
    sequence_ess: float

    def record(self) -> dict[str, float]:
        """For the metrics."""
        worst = max(response.mean_abs for response in self.responses.values())
        return {
            "mean_abs": self.whole.mean_abs,
            "max_abs": self.whole.max_abs,
            "kl": self.whole.mean,
            "worst_response": worst,
            "token_ess": self.whole.token_ess,
            "sequence_ess": self.sequence_ess,
        }

    def gate(self, config: MismatchConfig, step: int) -> frozenset[int]:
        """Sample indices that are not to be learned from.

        Args:
            config: what is done above which limit.
            step: counted from 1, for the message.

        Raises:
            MismatchError: a response is above the limit, and the gate is `stop`.
        """
        above = {
            index: distance.mean_abs for index, distance in self.responses.items() if distance.mean_abs > config.limit
        }
        if config.gate == "none" or not above:
            return frozenset()
        if config.gate == "mask":
            return frozenset(above)
        worst = max(above, key=above.__getitem__)
        raise MismatchError(
            f"step {step}: the engine's log-probabilities of {len(above)} of {len(self.responses)} responses are further than "
            f"rollout.mismatch.limit {config.limit:g} from the trainer's, sample {worst} by {above[worst]:.3g} nats a token; "
            "look at the engine's dtype and weights, raise the limit, or set rollout.mismatch.gate: mask"
        )


def engine_logprobs(rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
    """What the engine said of each response, [L] fp32 each.

    Raises:
        MismatchError: it said nothing, or not of every token.
    """
    for rollout in rollouts:
        said = 0 if rollout.logprobs is None else len(rollout.logprobs)
        if said != len(rollout.response_ids):
            raise MismatchError(
                f"rollout.mismatch: sample {rollout.sample_index} has {said} log-probabilities for {len(rollout.response_ids)} "
                "tokens; use an engine or file that has them, or set rollout.mismatch.every: 0 and gate: none"
            )
    return [torch.tensor(rollout.logprobs) for rollout in rollouts]


def compare(sample_indices: Sequence[int], engine: Sequence[torch.Tensor], trainer: Sequence[torch.Tensor]) -> Mismatch:
    """Compare the two policies on a step's responses.

    Args:
        sample_indices: of the responses.
        engine, trainer: log-probabilities of each response's tokens, [L] of any float dtype, L > 0.

    Raises:
        MismatchError: a log-probability is not finite.
    """
    deltas = {}
    for index, theirs, mine in zip(sample_indices, engine, trainer, strict=True):
        assert len(theirs) == len(mine) > 0, f"sample {index}: {len(theirs)} and {len(mine)} log-probabilities"
        for whose, values in (("engine", theirs), ("trainer", mine)):
            bad = (~values.isfinite()).nonzero()
            if len(bad):
                raise MismatchError(
                    f"rollout.mismatch: sample {index}: the {whose}'s log-probability of response token {int(bad[0])} is "
                    f"{float(values[bad[0]])}; its weights may hold NaN or infinity, or its vocabulary is another one"
                )
        deltas[index] = theirs.double() - mine.double()
    return Mismatch(
        Distance.of(torch.cat(list(deltas.values()))),
        {index: Distance.of(delta) for index, delta in deltas.items()},
        effective_sample_size(-torch.stack([delta.sum() for delta in deltas.values()])),
    )


def effective_sample_size(log_weights: torch.Tensor) -> float:
    """(sum w)^2 / (n sum w^2) of w = exp(`log_weights`), [n] float64."""
    weights = (log_weights - log_weights.max()).exp()
    return float(weights.sum() ** 2 / (len(weights) * weights.square().sum()))
