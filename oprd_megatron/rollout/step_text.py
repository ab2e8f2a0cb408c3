"""From the responses of a step to those that are learned from: age, policies, distance to the trainer's own policy."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from oprd_megatron.config.rollout import RolloutConfig
from oprd_megatron.errors import WeightSyncError
from oprd_megatron.models import Model
from oprd_megatron.parallel.agreement import together
from oprd_megatron.platform import Platform
from oprd_megatron.representation.batch import Sample
from oprd_megatron.rollout.engine import Rollout, SamplingParams
from oprd_megatron.rollout.mismatch import compare, engine_logprobs
from oprd_megatron.rollout.policies import Curated, curate, figures, refuse_nothing
from oprd_megatron.rollout.trainer_scores import score


@dataclass(frozen=True)
class Curator:
    """What a run does with responses before they become samples.

    Attributes:
        section: `rollout`.
        params: how they were drawn.
        eos_ids: the student's end-of-sequence ids.
        student: the model that is trained.
        platform: of this run.
    """

    section: RolloutConfig
    params: SamplingParams
    eos_ids: Collection[int]
    student: Model
    platform: Platform

    def take(self, step: int, group: Sequence[Rollout], weight_version: int, text: StepText) -> None:
        """Add a group of responses to what is waiting to be learned from. Collective.

        Args:
            step: counted from 0.
            group: of the step, all or some.
            weight_version: the student's.
            text: of the step so far.

        Raises:
            WeightSyncError: weights that are too old wrote it.
            MismatchError: it is not of the student's policy, and the gate is `stop`.
        """
        text.rollouts += group
        self._check_age(group, weight_version, text)
        curated = curate(group, self.section, self.eos_ids, text.curated)
        text.curated.append(curated)
        silent, gate = curated.masked, self.section.mismatch
        if curated.kept and (gate.gate != "none" or (gate.every and step % gate.every == 0)):
            compared = self._both_scores(curated.kept)
            text.compared.append(compared)
            text.gated |= compare(*compared).gate(gate, step + 1)
            silent = silent | text.gated
        for rollout in curated.kept:
            (text.silent if rollout.sample_index in silent else text.waiting).append(rollout)

    def _check_age(self, group: Sequence[Rollout], weight_version: int, text: StepText) -> None:
        """Text of recorded files may be of any version."""
        ages = [weight_version - rollout.weight_version for rollout in group]
        allowed = self.section.max_staleness if self.section.schedule == "one_step_off" else 0
        bad = [age for age in ages if not 0 <= age <= allowed]
        if bad and self.section.engine != "file":
            raise WeightSyncError(
                f"rollouts of weights {bad[0]} versions old, but rollout.schedule {self.section.schedule} allows {allowed}; "
                "start again to resume from the last checkpoint"
            )
        text.staleness = max([text.staleness, *ages])

    def _both_scores(self, rollouts: Sequence[Rollout]) -> tuple[list[int], list[torch.Tensor], list[torch.Tensor]]:
        """(sample indices, the engine's log-probabilities, the trainer's) on every rank."""
        with together("measuring the mismatch of engine and trainer"):
            theirs = engine_logprobs(rollouts)
        mine: list[Any] = [None]
        if self.student.grid.is_member:
            samples = [Sample(rollout.prompt_ids, rollout.response_ids) for rollout in rollouts]
            vocab_size = self.student.architecture.vocab_size
            vocab_size = min(vocab_size, self.params.vocab_size or vocab_size)
            mine = [score(self.student, self.platform, samples, self.params.temperature, vocab_size)]
        dist.broadcast_object_list(mine, src=self.student.grid.layout.first_rank)
        lengths = [len(rollout.response_ids) for rollout in rollouts]
        return [rollout.sample_index for rollout in rollouts], theirs, list(mine[0].split(lengths))


@dataclass
class StepText:
    """The responses of a step.

    Attributes:
        rollouts: all that have come.
        curated: groups after the run's policies.
        compared: of the groups, where it was measured: sample indices, the engine's log-probabilities, the trainer's.
        waiting: responses that are not learned from yet.
        silent: responses that teach nothing, and do not count in the mean yet.
        gated: sample indices of those that are too far from the trainer's policy.
        staleness: most versions that the weights of a response are behind the student's.
    """

    rollouts: list[Rollout] = field(default_factory=list)
    curated: list[Curated] = field(default_factory=list)
    compared: list[tuple[list[int], list[torch.Tensor], list[torch.Tensor]]] = field(default_factory=list)
    waiting: list[Rollout] = field(default_factory=list)
    silent: list[Rollout] = field(default_factory=list)
    gated: set[int] = field(default_factory=set)
    staleness: int = 0

    def refuse_nothing(self, step: int) -> None:
        """A step must have something to learn from; `step` counts from 1.

        Raises:
            DataError: it has not.
        """
        refuse_nothing(self.curated, step, self.gated)

    @property
    def num_tokens(self) -> int:
        """Response tokens."""
        return sum(len(rollout.response_ids) for rollout in self.rollouts)

    def record(self) -> dict[str, Any]:
        """For the step's metrics."""
        lengths = [len(rollout.response_ids) for rollout in self.rollouts]
        together = [[item for group in groups for item in group] for groups in zip(*self.compared, strict=True)]
        return {
            "response_length": {
                "mean": sum(lengths) / len(lengths),
                "max": max(lengths),
                "finished": sum(rollout.finished for rollout in self.rollouts) / len(self.rollouts),
            },
            "staleness": self.staleness,
            "waste": figures(self.curated, self.gated),
            **({"mismatch": compare(*together).record()} if together else {}),
        }
