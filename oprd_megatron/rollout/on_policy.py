"""The student's responses of a step, for training as for fitting a bridge or measuring a layer map.

    sync            write step k, learn from all of it, update
    overlap         write step k, learn from what is finished while the rest is being written, update
    one_step_off    write step k + 1 with the weights before the update while learning from step k

The last two need an engine that writes by itself (`DecodingEngine`), which one rank of the world holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from oprd_megatron.config.schema import RunConfig
from oprd_megatron.parallel.agreement import together
from oprd_megatron.rollout.collect import collect_rollouts, from_holder, holder_of
from oprd_megatron.rollout.engine import (
    DecodingEngine,
    Generation,
    Rollout,
    RolloutEngine,
    SamplingParams,
    make_requests,
)
from oprd_megatron.rollout.prompts import Prompt, PromptSource

OVERLAP_GROUPS = 8
"""Groups of responses that a step is learned in, if all are as long as they may be."""


class OnPolicy:
    """Prompts and sampling of a run.

    Args:
        config: the run.
        prompts: the training prompts.
        engine: this rank's, with the student's weights; None if this rank holds none.
        vocab_size: only ids below this are written.
    """

    def __init__(self, config: RunConfig, prompts: list[Prompt], engine: RolloutEngine | None, vocab_size: int) -> None:
        section = config.rollout
        self.section, self.engine = section, engine
        self.source = PromptSource(prompts, config.run.seed)
        self.params = SamplingParams(
            temperature=section.temperature,
            top_p=section.top_p,
            max_response_tokens=section.max_response_tokens,
            stop=tuple(section.stop),
            seed=config.run.seed,
            vocab_size=vocab_size,
        )
        self._ahead: tuple[int, Generation] | None = None

    @property
    def most_tokens(self) -> int:
        """Response tokens of a step in which every response is as long as it may be."""
        section = self.section
        return section.prompts_per_step * section.responses_per_prompt * section.max_response_tokens

    def rollouts(self, step: int) -> list[Rollout]:
        """The responses of one step (counted from 0), on every rank, in order. Collective."""
        prompts = self.source.batch(step, self.section.prompts_per_step)
        return collect_rollouts(self.engine, prompts, self.section.responses_per_prompt, self.params, step)

    def groups(self, step: int, last: int) -> Iterator[list[Rollout]]:
        """The responses of one step in the groups that they are learned in, on every rank. Collective, and between two groups
        nothing else of this object may be called.

        Args:
            step: counted from 0.
            last: the step after which no other follows in this process.
        """
        if self.section.schedule == "sync":
            yield self.rollouts(step)
            return
        holder = holder_of(self.engine)
        generation = self._begin(step)
        if self.section.schedule == "one_step_off":
            found, _ = from_holder(holder, generation, None)
            ahead = self._begin(step + 1) if step < last else None
            if ahead is not None:
                self._ahead = step + 1, ahead
            yield found
            return
        size, done = self.section.overlap_tokens or max(1, self.most_tokens // OVERLAP_GROUPS), False
        while not done:
            found, done = from_holder(holder, generation, size)
            yield found

    def settle(self) -> None:
        """Wait until the engine writes nothing: its weights may then be updated. Collective."""
        with together("waiting for the next step's rollouts"):
            if self._ahead is not None:
                step, generation = self._ahead
                self._ahead = step, Finished(generation.take())

    def _begin(self, step: int) -> Generation | None:
        if self.engine is None:
            return None
        if self._ahead is not None and self._ahead[0] == step:
            (_, generation), self._ahead = self._ahead, None
            return generation
        requests = make_requests(
            self.source.batch(step, self.section.prompts_per_step), self.section.responses_per_prompt
        )
        return cast(DecodingEngine, self.engine).start(requests, self.params, step)


class Finished:
    """A `Generation` that is done."""

    def __init__(self, rollouts: list[Rollout]) -> None:
        self._rollouts = rollouts

    def take(self, min_tokens: int | None = None) -> list[Rollout]:
        """All of it, once."""
        rollouts, self._rollouts = self._rollouts, []
        return rollouts

    @property
    def is_taken(self) -> bool:
        """Whether `take` was called."""
        return not self._rollouts
