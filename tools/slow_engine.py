"""A stand-in for a rollout server where only its timing matters: responses are known at once and handed out when they would be
finished. For tests of the trainer's schedules and for tools/benchmark_schedules.py."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator

import numpy as np
import torch

from oprd_megatron.rollout import Request, Rollout, RolloutEngine, SamplingParams


class SlowEngine:
    """A `DecodingEngine` that writes what another engine writes, at its own speed.

    Args:
        engine: writes the text.
        seconds_per_token: of each response, however many are being written.
        slots: responses that are written at a time; the others wait, in order.
    """

    def __init__(self, engine: RolloutEngine, seconds_per_token: float, slots: int = 10**6) -> None:
        self.engine, self.seconds_per_token, self.slots = engine, seconds_per_token, slots
        self.replica = engine.replica
        self.updates: list[int] = []
        """Versions of the weights that it was given."""

    def start(self, requests: list[Request], params: SamplingParams, step: int) -> SlowGeneration:
        """Begin to write."""
        rollouts = self.engine.generate(requests, params, step)
        now, free = time.perf_counter(), [time.perf_counter()] * min(self.slots, len(requests))
        finished = []
        for rollout in rollouts:
            end = max(heapq.heappop(free), now) + len(rollout.response_ids) * self.seconds_per_token
            heapq.heappush(free, end)
            finished.append((end, rollout))
        return SlowGeneration(finished)

    def generate(self, requests: list[Request], params: SamplingParams, step: int) -> list[Rollout]:
        """Write, and wait for all of it."""
        return self.start(requests, params, step).take()

    def update_weights(self, version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """As the engine inside."""
        self.updates.append(version)
        self.engine.update_weights(version, tensors)

    def score(self, token_ids: list[list[int]]) -> list[torch.Tensor]:
        """As the engine inside."""
        return self.engine.score(token_ids)

    def score_each(self, token_ids: list[list[int]]) -> dict[str, list[torch.Tensor]]:
        """As the engine inside."""
        return self.engine.score_each(token_ids)

    def checksums(self) -> dict[str, dict[str, int]]:
        """As the engine inside."""
        return self.engine.checksums()

    def close(self) -> None:
        """As the engine inside."""
        self.engine.close()


class SlowGeneration:
    """Responses with the time (`time.perf_counter`) at which each is finished."""

    def __init__(self, finished: list[tuple[float, Rollout]]) -> None:
        self._waiting = sorted(finished, key=lambda item: item[0])

    def take(self, min_tokens: int | None = None) -> list[Rollout]:
        """As `Generation.take`."""
        taken: list[Rollout] = []
        while self._waiting and (min_tokens is None or sum(len(r.response_ids) for r in taken) < min_tokens):
            time.sleep(max(0.0, self._waiting[0][0] - time.perf_counter()))
            now = time.perf_counter()
            while self._waiting and self._waiting[0][0] <= now:
                taken.append(self._waiting.pop(0)[1])
        return sorted(taken, key=lambda rollout: rollout.sample_index)

    @property
    def is_taken(self) -> bool:
        """Whether nothing is left."""
        return not self._waiting


class RandomText:
    """A `RolloutEngine` without a model: random ids, log-normal lengths (most responses short, a few as long as allowed), which
    are the same in every step, so that steps compare.

    Args:
        vocab_size: ids below this.
        median, sigma: of the lengths; `sigma` is the standard deviation of their logarithm.
    """

    replica: int | None = None

    def __init__(self, vocab_size: int, median: float, sigma: float) -> None:
        self.vocab_size, self.median, self.sigma = vocab_size, median, sigma
        self._version = 0

    def generate(self, requests: list[Request], params: SamplingParams, step: int) -> list[Rollout]:
        """One response each, the same for the same seed, step and sample."""
        return [self._response(request, params, step) for request in requests]

    def _response(self, request: Request, params: SamplingParams, step: int) -> Rollout:
        draw = np.random.default_rng([params.seed, request.sample_index])
        wanted = max(1, round(self.median * float(np.exp(self.sigma * draw.standard_normal()))))
        length = min(wanted, params.max_response_tokens)
        draw = np.random.default_rng([params.seed, step, request.sample_index])
        ids = tuple(draw.integers(0, self.vocab_size, length).tolist())
        return Rollout(
            request.prompt.index, request.sample_index, request.prompt.token_ids, ids, self._version, wanted <= length
        )

    def update_weights(self, version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Remember the version."""
        for _ in tensors:
            pass
        self._version = version

    def score(self, token_ids: list[list[int]]) -> list[torch.Tensor]:
        """There is no model."""
        raise NotImplementedError("RandomText has no model to score with")

    def score_each(self, token_ids: list[list[int]]) -> dict[str, list[torch.Tensor]]:
        """There is no copy of the weights."""
        return {}

    def checksums(self) -> dict[str, dict[str, int]]:
        """There is no copy of the weights."""
        return {}

    def close(self) -> None:
        """Nothing to free."""
