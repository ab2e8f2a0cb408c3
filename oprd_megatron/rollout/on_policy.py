"""The student's responses of a step, for training as for fitting a bridge or measuring a layer map."""

from __future__ import annotations

from oprd_megatron.config.schema import RunConfig
from oprd_megatron.rollout.collect import collect_rollouts
from oprd_megatron.rollout.engine import Rollout, RolloutEngine, SamplingParams
from oprd_megatron.rollout.prompts import Prompt, PromptSource


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

    def rollouts(self, step: int) -> list[Rollout]:
        """The responses of one step (counted from 0), on every rank, in order. Collective."""
        prompts = self.source.batch(step, self.section.prompts_per_step)
        return collect_rollouts(self.engine, prompts, self.section.responses_per_prompt, self.params, step)
