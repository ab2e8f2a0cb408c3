"""One teacher's part of a run, and of a step. Most runs have one lesson.

Where prompts are routed, a step's rollouts are dealt to the lessons, and every mean is over all of them: the representation
loss divides by the supervised tokens of all lessons' samples, each output term by its own tokens of all lessons' samples. Where
teachers are averaged, every lesson has all rollouts and means of its own, and counts with its weight:

    routed      loss = sum over lessons of  (sum over its tokens) / (tokens of all lessons)
    averaged    loss = sum over lessons of  weight * (sum over its tokens) / (its tokens)

The gradients of all lessons go into the same buffers, which are finalised after the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from oprd_megatron.models import Model
from oprd_megatron.objectives.output_loss import OutputLoss
from oprd_megatron.optimizer import StudentOptimizer
from oprd_megatron.placing import PlacedTeacher
from oprd_megatron.platform import Platform
from oprd_megatron.representation.alignment import Alignment, AlignmentReport
from oprd_megatron.representation.batch import BatchPlan, Sample, filled_up
from oprd_megatron.representation.flow import Passes, Phase
from oprd_megatron.rollout import Rollout
from oprd_megatron.rollout.samples import SampleMaker


@dataclass(frozen=True)
class Lesson:
    """What one teacher teaches.

    Attributes:
        placed: the teacher.
        alignment: with the student.
        output: the output terms, if the run has some.
        samples: makes samples of the rollouts that it teaches.
    """

    placed: PlacedTeacher
    alignment: Alignment
    output: OutputLoss | None
    samples: SampleMaker

    @classmethod
    def of(cls, placed: PlacedTeacher, student: Model, platform: Platform) -> Lesson:
        """The lesson of a teacher that is in its place."""
        config, output = placed.checked.config, None
        if config.output.terms:
            output = OutputLoss(placed.model, student, config.output, platform.device)
        alignment = Alignment(
            placed.model,
            student,
            config.distill,
            platform,
            config.run.micro_batch_size,
            config.run.micro_batch_tokens,
            placed.space,
            signal=output.signal if output else None,
        )
        return cls(placed, alignment, output, placed.checked.sample_maker(placed.checked.prompts))

    @property
    def name(self) -> str:
        """The teacher's."""
        return self.placed.name

    def of_rollouts(self, rollouts: Sequence[Rollout]) -> list[Sample]:
        """Samples of those rollouts whose prompts this teacher teaches, in order."""
        mine = [rollout for rollout in rollouts if rollout.prompt_index in self.samples.prompts]
        return self.samples.of_student(mine) if mine else []


@dataclass(frozen=True)
class Share:
    """A lesson's part of a step.

    Attributes:
        lesson: whose.
        plan: its samples, filled up to what both grids can arrange; `num_tokens` is what the loss divides by.
        num_samples, num_tokens, counts: samples, supervised tokens and tokens of each output term of this share alone.
        denominators: what each output term divides by.
        silent_tokens: tokens that teach nothing but count in the mean.
    """

    lesson: Lesson
    plan: BatchPlan
    num_samples: int
    num_tokens: int
    counts: Sequence[int]
    denominators: Sequence[int]
    silent_tokens: int = 0


def plan_shares(
    lessons: Sequence[Lesson],
    samples: Sequence[Sequence[Sample]],
    averaged: bool = False,
    silent: Sequence[Sequence[Sample]] | None = None,
    denominator: int | None = None,
) -> list[Share]:
    """Plan a step, or a group of its samples; a lesson without a supervised token is left out.

    Args:
        lessons: of the run.
        samples: each lesson's.
        averaged: every lesson has means of its own; else they are over all lessons.
        silent: each lesson's samples that teach nothing but count in the mean; left out, there are none.
        denominator: what everything is divided by for now, because the step's tokens are not known yet.

    Raises:
        DataError: no token of the batch is supervised.
    """
    silent = silent or [[] for _ in lessons]
    parts = [part for part in zip(lessons, samples, silent, strict=True) if part[1]]
    tokens, silent_tokens = ([lesson.alignment.flow.planner.num_tokens(part[which]) for lesson, *part in parts]
                             for which in (0, 1))  # fmt: skip
    there = [number for number, count in enumerate(tokens) if count] or [0]
    counts = [lesson.output.counts([*some, *others]) if lesson.output else [] for lesson, some, others in parts]
    shares = []
    for number in there:
        lesson, some, _ = parts[number]
        plan = lesson.alignment.plan(filled_up(some, lesson.alignment.flow.planner.unit))
        mine, own = tokens[number] + silent_tokens[number], lesson.output.counts(some) if lesson.output else []
        whole, denominators = mine, counts[number]
        if not averaged:
            whole = sum(tokens) + sum(silent_tokens)
            denominators = [sum(of_term) for of_term in zip(*counts, strict=True)]
        if denominator is not None:
            whole, denominators = denominator, [denominator] * len(own)
        share = Share(lesson, replace(plan, num_tokens=whole), len(some), tokens[number], own, denominators,
                      silent_tokens[number])  # fmt: skip
        shares.append(share)
    return shares


@dataclass(frozen=True)
class Outcome:
    """What a share came to, the same on every rank but for `sums`.

    Attributes:
        share: of the step.
        report: averages over the share's own tokens.
        terms: what the share adds to each output term's mean, without the lesson's weight.
        sums: this rank's, as `Alignment.run` returns them.
        rounding: what this rank's part of the wire lost (`Delivery`).
    """

    share: Share
    report: AlignmentReport
    terms: dict[str, float]
    sums: dict[int, torch.Tensor]
    rounding: np.ndarray

    @property
    def weight(self) -> float:
        """Of the lesson."""
        return self.share.lesson.placed.weight

    @property
    def loss(self) -> float:
        """What the share adds to the representation loss."""
        return self.weight * self.report.loss * (self.share.num_tokens / self.share.plan.num_tokens)

    def record(self, weights: Mapping[str, float]) -> dict[str, Any]:
        """The teacher's entry in a step's record: its own means. `weights` are the output terms'."""
        share, report = self.share, self.report
        labels = [term.label for term in share.lesson.output.terms] if share.lesson.output else []
        of_term = {
            label: whole / max(1, own)
            for label, whole, own in zip(labels, share.denominators, share.counts, strict=True)
        }
        terms = {name: value * of_term[name] for name, value in self.terms.items()}
        return {
            "samples": share.num_samples,
            "supervised_tokens": share.num_tokens,
            "loss": report.loss + sum(weights[name] * value for name, value in terms.items()),
            "cosine": report.mean_cosine,
            **({"terms": terms} if terms else {}),
            **({} if report.wire_error is None else {"wire_error": report.wire_error}),
            **({"layers": report.by_layer()} if report.student_layers else {}),
        }


def learn(
    share: Share, weights: Mapping[str, float], optimizer: StudentOptimizer | None, phase: Phase, finalize: bool
) -> Outcome:
    """Add a share's gradients to the student's buffers. Collective.

    Args:
        share: of the step.
        weights: of the output terms.
        optimizer: the student's; None on ranks without it.
        phase: times what is done.
        finalize: this is the step's last share.
    """
    lesson, output = share.lesson, None
    placed = lesson.placed
    with placed.at_work(phase):
        if lesson.output is not None:
            scaled = {name: weight * placed.weight for name, weight in weights.items()}
            output = lesson.output.of_batch(share.plan, scaled, share.denominators)
        passes = Passes(
            train=True,
            finalize=finalize,
            chunks=optimizer.chunks if optimizer else None,
            on_outputs=output.on_outputs if output else None,
            phase=phase,
        )
        sums = lesson.alignment.run(share.plan, passes, weight=placed.weight)
    rounding = lesson.alignment.flow.rounding
    return Outcome(share, lesson.alignment.reduce(sums), output.means() if output else {}, sums, rounding)


def whole_step(
    parts: Sequence[Outcome], silent: Mapping[str, int], averaged: bool = False
) -> tuple[list[Outcome], float]:
    """A step that was learned in groups with one provisional denominator, as if at once. Collective.

    Representation loss and output terms count the same tokens (checked with the config), so that one factor puts all right.

    Args:
        parts: of all groups, in order; at least one.
        silent: {lesson: tokens that count in the mean and were in no group}.
        averaged: as for `plan_shares`.

    Returns:
        One outcome for each lesson; the factor that the gradients lack.
    """
    by_lesson: dict[str, list[Outcome]] = {}
    for part in parts:
        by_lesson.setdefault(part.share.lesson.name, []).append(part)
    counted = dict(silent)
    for part in parts:
        counted[part.share.lesson.name] += part.share.num_tokens + part.share.silent_tokens
    whole, outcomes = sum(counted.values()), []
    for name, some in by_lesson.items():
        first, provisional = some[0].share, some[0].share.plan.num_tokens
        total = counted[name] if averaged else whole
        plan = BatchPlan(
            [sample for part in some for sample in part.share.plan.samples],
            total,
            [chunk for part in some for chunk in part.share.plan.chunks],
        )
        share = replace(
            first,
            plan=plan,
            num_samples=sum(part.share.num_samples for part in some),
            num_tokens=sum(part.share.num_tokens for part in some),
            counts=[sum(of_term) for of_term in zip(*(part.share.counts for part in some), strict=True)],
            denominators=[total] * len(first.counts),
            silent_tokens=sum(part.share.silent_tokens for part in some),
        )
        sums: dict[int, torch.Tensor] = {}
        for part in some:
            for layer, value in part.sums.items():
                sums[layer] = sums.get(layer, torch.zeros_like(value)) + value
        rounding = sum((part.rounding for part in some), np.zeros(2))
        terms = {
            label: sum(part.terms.get(label, 0.0) for part in some) * provisional / total for label in some[0].terms
        }
        report = first.lesson.alignment.reduce(sums, rounding)
        outcomes.append(Outcome(share, report, terms, sums, rounding))
    return outcomes, parts[0].share.plan.num_tokens / outcomes[0].share.plan.num_tokens


@dataclass(frozen=True)
class Totals:
    """A step over all its shares: loss, each output term's mean, mean cosine by tokens (None where no states are compared)."""

    loss: float
    terms: dict[str, float]
    cosine: float | None

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], weights: Mapping[str, float]) -> Totals:
        """Add up. `weights` are the output terms'."""
        names = dict.fromkeys(name for outcome in outcomes for name in outcome.terms)
        terms = {name: sum(o.weight * o.terms.get(name, 0.0) for o in outcomes) for name in names}
        loss = sum(o.loss for o in outcomes) + sum(weights[name] * value for name, value in terms.items())
        return cls(
            loss, terms, mean_by([o.report.mean_cosine for o in outcomes], [o.share.num_tokens for o in outcomes])
        )


def mean_by(values: Sequence[float | None], tokens: Sequence[int]) -> float | None:
    """Mean of the values that there are, weighted by tokens; a value that is alone is itself, to the last bit."""
    there = [(value, count) for value, count in zip(values, tokens, strict=True) if value is not None]
    if len(there) < 2:
        return there[0][0] if there else None
    return sum(value * count for value, count in there) / sum(count for _, count in there)
