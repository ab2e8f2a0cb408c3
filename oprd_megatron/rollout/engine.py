"""The seam between the trainer and whatever writes the student's text.

An engine gets requests, returns rollouts, and is handed the trainer's weights after every update. It must keep one
promise: the text of a sample depends on the weights, the sampling parameters, the step and the sample's index, and on
nothing else, so that a run does not change with the parallel layout or the batch size (up to rounding, see `sampling`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from oprd_megatron.rollout.prompts import Prompt


@dataclass(frozen=True)
class Request:
    """One response wanted. `sample_index` counts the step's responses over all ranks, from 0."""

    prompt: Prompt
    sample_index: int


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling on the tempered distribution; 1 keeps the whole vocabulary."""
    max_response_tokens: int = 1024
    stop: tuple[str, ...] = ()
    """Stop strings, besides the model's end-of-sequence tokens."""
    seed: int = 0
    vocab_size: int | None = None
    """Only ids below this are written; None allows all. For a model whose partner has a smaller vocabulary."""


@dataclass(frozen=True)
class Rollout:
    """One response, as token ids."""

    prompt_index: int
    """`Prompt.index` of the prompt it answers."""
    sample_index: int
    """`Request.sample_index`."""
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    """At least one token; ends with the end-of-sequence token if the model wrote one."""
    weight_version: int
    """Version of the weights that wrote it."""
    finished: bool
    """True: ended by an end-of-sequence token or stop string. False: cut at max_response_tokens, or by a time limit."""
    logprobs: tuple[float, ...] | None = None
    """Log-probability (nats) of each response token under the distribution that it was drawn from: with the temperature, within
    the nucleus of top_p. None if the engine does not say."""


class RolloutEngine(Protocol):
    """What the trainer asks of an engine.

    Attributes:
        replica: number of the engine that this rank has a part of, where several ranks write together; None if it is this
            rank's alone.
    """

    replica: int | None

    def generate(self, requests: list[Request], params: SamplingParams, step: int) -> list[Rollout]:
        """One rollout per request, in the order of the requests."""
        ...

    def update_weights(self, version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Take every weight, under its Hugging Face name and in full shape; missing or unknown names are errors."""
        ...

    def score(self, token_ids: list[list[int]]) -> list[torch.Tensor]:
        """fp32 log-probability of each token given those before it, `[length - 1]` per sequence, untempered, on CPU."""
        ...

    def score_each(self, token_ids: list[list[int]]) -> dict[str, list[torch.Tensor]]:
        """`score` by every copy of the weights that the engine has, such as its servers, by name."""
        ...

    def checksums(self) -> dict[str, dict[str, int]]:
        """{copy: {weight: crc32 of its bytes as it was received}}; a copy that cannot say is left out."""
        ...

    def close(self) -> None:
        """Free the engine's memory; it cannot be used afterwards."""
        ...


class Generation(Protocol):
    """Requests on their way, in an engine that writes by itself."""

    def take(self, min_tokens: int | None = None) -> list[Rollout]:
        """Wait for finished responses that were not taken before.

        Args:
            min_tokens: wait until there are so many response tokens, or until all is done; None waits for all.

        Returns:
            In the order of sample indices; nothing once all have been taken.
        """
        ...

    @property
    def is_taken(self) -> bool:
        """Whether every response has been taken."""
        ...


class DecodingEngine(RolloutEngine, Protocol):
    """An engine that goes on writing while its caller does something else."""

    def start(self, requests: list[Request], params: SamplingParams, step: int) -> Generation:
        """Begin to write; `generate` is `start` and `take` of all. No weights may be updated before all are taken."""
        ...


def make_requests(prompts: list[Prompt], responses_per_prompt: int) -> list[Request]:
    """The requests of one step: a prompt's responses lie next to each other, sample indices count up from 0."""
    wanted = [prompt for prompt in prompts for _ in range(responses_per_prompt)]
    return [Request(prompt, sample_index) for sample_index, prompt in enumerate(wanted)]
