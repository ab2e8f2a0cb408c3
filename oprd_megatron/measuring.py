"""What a run measures besides its loss: held-out evaluation, and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from oprd_megatron.benchmarks.in_loop import InLoop
from oprd_megatron.config import RunConfig
from oprd_megatron.evaluation.several import Evaluation
from oprd_megatron.parallel.activity import here
from oprd_megatron.rollout.engine import RolloutEngine


class Measuring:
    """When each is due, and its records.

    Args:
        config: of the run.
        held_out: None if the run has no `eval` section.
        benchmark: None if it has no `benchmark` section.
    """

    def __init__(self, config: RunConfig, held_out: Evaluation | None, benchmark: InLoop | None) -> None:
        self.steps = config.run.steps
        self.shows_samples = config.rollout.engine != "file"  # recorded text has no answers to held-out prompts
        self.held_out, self.benchmark = held_out, benchmark

    def records(self, step: int, engine: RolloutEngine | None) -> Iterator[dict[str, Any]]:
        """Those that are due after `step` finished steps, which all are after none. Collective, each of them.

        Args:
            step: finished training steps.
            engine: this rank's engine with the student's weights, if it holds one.
        """
        if self.held_out and (step == 0 or self.held_out.due(step, self.steps)):
            samples = self.shows_samples and step in (0, self.steps)
            with here.phase("eval"):
                record = self.held_out.record(step, engine, samples=samples)
            yield record
        if self.benchmark and (step == 0 or self.benchmark.due(step, self.steps)):
            with here.phase("benchmark"):
                record = self.benchmark.record(step, engine)
            yield record
