"""The algorithm: one step of on-policy representation distillation, phase by phase.

rollouts -> plan -> teacher states -> exchange -> student loss and gradient -> optimizer -> weight sync -> probe
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpoints_conversion.live.export import export_hf
from checkpoints_conversion.weights import hf_dir_of
from oprd_megatron.averaging import AveragedTeacher
from oprd_megatron.bridge.fit import Stage1
from oprd_megatron.divergence import stop_on_bad_gradient, stop_on_bad_loss
from oprd_megatron.lesson import Lesson, Outcome, Share, Totals, learn, plan_shares, whole_step
from oprd_megatron.models import DTYPES, Model
from oprd_megatron.objectives.output_loss import OutputLoss
from oprd_megatron.optimizer import StudentOptimizer, build_optimizer
from oprd_megatron.parallel.agreement import together
from oprd_megatron.phases import Phases
from oprd_megatron.placing import PlacedTeacher
from oprd_megatron.platform import Platform
from oprd_megatron.preflight import Checked
from oprd_megatron.representation.alignment import Alignment
from oprd_megatron.representation.batch import Sample
from oprd_megatron.representation.space import LowRank
from oprd_megatron.rollout import Rollout, RolloutEngine
from oprd_megatron.rollout.buffer import FOLDER, BufferedEngine, run_fingerprint
from oprd_megatron.rollout.build import prepare_engine
from oprd_megatron.rollout.hf_engine import eos_ids
from oprd_megatron.rollout.on_policy import OnPolicy
from oprd_megatron.rollout.probe import (
    TOLERANCES,
    Difference,
    check_probe,
    differing_weights,
    is_within,
    make_probe,
    probe_difference,
)
from oprd_megatron.rollout.samples import SampleMaker
from oprd_megatron.rollout.step_text import Curator, StepText
from oprd_megatron.rollout.weight_sync import sync_weights


@dataclass
class Studied:
    """What a step has come to so far.

    Attributes:
        text: its responses.
        outcomes: of the shares.
        norms: of each term's gradient, if they were measured.
        refitted: the bridge was.
    """

    text: StepText = field(default_factory=StepText)
    outcomes: list[Outcome] = field(default_factory=list)
    norms: dict[str, float] | None = None
    refitted: bool = False


class Trainer:
    """A run between its steps.

    Args:
        checked: from `preflight`.
        teachers, student: from `build_all`, or from `build_models`.
        platform: of this rank.
        make_engine: makes this rank's rollout engine, or None if it holds none; left out, as the config says. Collective.
    """

    def __init__(
        self,
        checked: Checked,
        teachers: Model | Sequence[PlacedTeacher],
        student: Model,
        platform: Platform,
        make_engine: Callable[[], RolloutEngine | None] | None = None,
    ) -> None:
        config = checked.config
        self.config, self.platform, self.student = config, platform, student
        if isinstance(teachers, Model):
            teachers = [PlacedTeacher.of_one(checked, teachers, student, platform)]
        self.lessons = [Lesson.of(teacher, student, platform) for teacher in teachers]
        self.optimizer: StudentOptimizer | None = None  # stays None on ranks of the teacher alone
        if student.grid.is_member:
            trains_head = bool(config.output.terms)
            self.optimizer = build_optimizer(student, config.optimizer, config.run.steps, platform, trains_head)
        self.average: AveragedTeacher | None = None
        if config.teacher.ema_decay is not None:
            self.average = AveragedTeacher(self.lessons[0].placed.model, student, config.teacher.ema_decay)
        if make_engine is None:
            make_engine = prepare_engine(checked.writer, student.grid.layout, platform)
        self.engine = make_engine()
        writer = self.engine
        if writer is not None and config.rollout.buffer and config.rollout.engine != "file":
            writer = BufferedEngine(writer, config.run.dir / FOLDER, dist.get_rank(), run_fingerprint(config))
        self.text = OnPolicy(config, checked.prompts, writer, checked.student_vocab_size)
        longest = max(len(prompt.token_ids) for prompt in checked.prompts) + config.rollout.max_response_tokens
        self.probe = make_probe(checked.prompts, min(longest, checked.student.max_position_embeddings))
        self.tolerance = TOLERANCES[DTYPES[config.student.dtype]]
        if config.rollout.probe_tolerance is not None:
            self.tolerance = Difference(config.rollout.probe_tolerance, config.rollout.probe_tolerance)
        ends = frozenset(eos_ids(config.student.path, checked.tokenizer.eos_token_id))
        self.curator = Curator(config.rollout, self.text.params, ends, student, platform)
        self.weight_version = 0
        self.own_seconds: dict[str, float] = {}  # of the last step, see `Phases.own`
        self.last_step = min(config.run.steps, config.run.stop_at or config.run.steps) - 1

    def step(self, step: int) -> dict[str, Any]:
        """One training step; `step` counts from 0. Returns its record for the metrics. Collective.

        Raises:
            TrainingDiverged: a loss or gradient is not finite.
            WeightSyncError: the engine does not hold the student's new weights.
        """
        start, phase = time.perf_counter(), Phases(self.platform)
        progress = step / max(1, self.config.run.steps - 1)
        for lesson in self.lessons:
            lesson.alignment.advance(progress)
        weights = self.output.weights(progress) if self.output else {}
        studied = Studied()
        self.zero_grad()
        for group in phase.of_each("rollout", self.text.groups(step, self.last_step)):
            self.study(step, group, weights, studied, phase)
        outcomes = self.finish(step, studied)
        shares = [outcome.share for outcome in outcomes]
        with phase("optimizer"):
            grad_norm, lr = self.update()
            if self.average is not None:
                self.average.update()
        stop_on_bad_gradient(step + 1, grad_norm, self.optimizer)
        difference = self.sync(self.weight_version + 1, phase)
        self.own_seconds = phase.own
        totals, report = Totals.of(outcomes, weights), outcomes[0].report
        aligned = {lesson.alignment.coefficient for lesson in self.lessons if lesson.alignment.pairs}
        shown = {"oprd": aligned.pop()} if len(aligned) == 1 else {}
        is_scheduled = isinstance(self.config.distill.coefficient, list)
        record = {
            "kind": "train",
            "step": step + 1,
            "loss": totals.loss,
            **({"terms": totals.terms} if totals.terms else {}),
            **({"weights": {**shown, **weights}} if weights or is_scheduled else {}),
            **({} if studied.norms is None else {"gradient_norms": studied.norms}),
            "cosine": totals.cosine,
            "lr": lr,
            "grad_norm": grad_norm,
            "supervised_tokens": max(share.plan.num_tokens for share in shares),
            **studied.text.record(),
            "tokens_per_second": studied.text.num_tokens / (time.perf_counter() - start),
            "seconds": phase.seconds,
            "exchanged_bytes": sum(share.lesson.alignment.planned_bytes(share.plan) for share in shares),
            "chunks": sum(len(share.plan.chunks) for share in shares),
            **({} if report.wire_error is None or self.config.teachers else {"wire_error": report.wire_error}),
            **({} if difference is None else {"probe_difference": difference.max, "probe_mean": difference.mean}),
            "weight_version": self.weight_version,
        }
        if self.config.teachers:
            found = {outcome.share.lesson.name: outcome.record(weights) for outcome in outcomes}
            return {**record, "teachers": {item.name: found.get(item.name, {"samples": 0}) for item in self.lessons}}
        return {
            **record,
            **({} if report.inside is None else {"inside": sum(report.inside) / len(report.inside)}),
            **({} if self.samples.aligned_fraction is None else {"aligned_fraction": self.samples.aligned_fraction}),
            **({"refitted": True} if studied.refitted else {}),
            **({"layers": report.by_layer()} if report.student_layers else {}),
        }

    def study(
        self, step: int, group: list[Rollout], weights: Mapping[str, float], studied: Studied, phase: Phases
    ) -> None:
        """Learn from a group of responses: all of a step, or those that are finished. Collective."""
        text = studied.text
        self.curator.take(step, group, self.weight_version, text)
        if not self.learns_in_groups:
            text.refuse_nothing(step + 1)
        samples = [lesson.of_rollouts(text.waiting) for lesson in self.lessons]
        if self.learns_in_groups and not self._teaches(samples):
            return
        if not self.learns_in_groups:
            studied.refitted = self.refit(step, samples[0])
        denominator = self.text.most_tokens if self.learns_in_groups else None
        uncounted = [lesson.of_rollouts(text.silent) for lesson in self.lessons]
        shares = plan_shares(self.lessons, samples, self.is_averaged, uncounted, denominator)
        text.waiting, text.silent = [], []
        every = self.config.logging.gradient_norms_every
        if every and step % every == 0:
            studied.norms = self.gradient_norms(step, shares, weights)
        studied.outcomes += self.forward_backward(step, shares, weights, phase, finalize=not self.learns_in_groups)

    def _teaches(self, samples: Sequence[Sequence[Sample]]) -> bool:
        """Whether a token of these samples is supervised, in any lesson."""
        planners = [lesson.alignment.flow.planner for lesson in self.lessons]
        return any(planner.num_tokens(some) for planner, some in zip(planners, samples, strict=True))

    def finish(self, step: int, studied: Studied) -> list[Outcome]:
        """Complete the gradients of a step that was learned in groups. Returns what each lesson came to. Collective.

        Raises:
            DataError: no token of the step is supervised.
        """
        if not self.learns_in_groups:
            return studied.outcomes
        text = studied.text
        if not studied.outcomes:
            text.refuse_nothing(step + 1)
            plan_shares(self.lessons, [lesson.of_rollouts(text.waiting) for lesson in self.lessons])
        rest = [lesson.of_rollouts(text.silent) for lesson in self.lessons]
        uncounted = {
            lesson.name: lesson.alignment.flow.planner.num_tokens(some)
            for lesson, some in zip(self.lessons, rest, strict=True)
        }
        outcomes, factor = whole_step(studied.outcomes, uncounted, self.is_averaged)
        if self.optimizer is not None:
            self.optimizer.finish_gradients(factor)
        return outcomes

    @property
    def alignment(self) -> Alignment:
        """The first teacher's, which in most runs is the only one."""
        return self.lessons[0].alignment

    @property
    def output(self) -> OutputLoss | None:
        """The first teacher's; None without output terms."""
        return self.lessons[0].output

    @property
    def samples(self) -> SampleMaker:
        """The first teacher's."""
        return self.lessons[0].samples

    @property
    def learns_in_groups(self) -> bool:
        """Whether finished responses are learned from while others are still being written."""
        return self.config.rollout.schedule == "overlap"

    @property
    def is_averaged(self) -> bool:
        """Whether several teachers teach the same samples."""
        return self.config.teaching is not None and self.config.teaching.by == "average"

    def forward_backward(
        self, step: int, shares: Sequence[Share], weights: Mapping[str, float], phase: Phases, finalize: bool = True
    ) -> list[Outcome]:
        """Add the gradients of the shares to the student's buffers. Returns what each share came to. Collective.

        Args:
            step: counted from 0.
            shares: of the step, or of a group.
            weights: of the output terms.
            phase: times what is done.
            finalize: reduce gradients over ranks; False when another group of the step follows.

        Raises:
            TrainingDiverged: some part of the loss is not finite.
        """
        outcomes = []
        for number, share in enumerate(shares):
            last = finalize and number + 1 == len(shares)
            outcomes.append(learn(share, weights, self.optimizer, phase, finalize=last))
            stop_on_bad_loss(step + 1, outcomes[-1], f"teacher {share.lesson.name}, " if self.config.teachers else "")
        return outcomes

    def gradient_norms(self, step: int, shares: Sequence[Share], weights: Mapping[str, float]) -> dict[str, float]:
        """Norm of each term's own gradient, with its weight: the representation loss's is called oprd. Collective; one pass of
        both models for each term."""
        alignments, phase = [lesson.alignment for lesson in self.lessons], Phases(self.platform)
        coefficients = [alignment.coefficient for alignment in alignments]
        norms = {}
        for name in [*(["oprd"] if any(alignment.pairs for alignment in alignments) else []), *weights]:
            for alignment, coefficient in zip(alignments, coefficients, strict=True):
                alignment.coefficient = coefficient if name == "oprd" else 0.0
            self.zero_grad()
            self.forward_backward(
                step, shares, {term: weight * (term == name) for term, weight in weights.items()}, phase
            )
            norms[name] = self.on_every_rank(self.optimizer.grad_norm() if self.optimizer else 0.0)[0]
        for alignment, coefficient in zip(alignments, coefficients, strict=True):
            alignment.coefficient = coefficient
        self.zero_grad()
        return norms

    def zero_grad(self) -> None:
        """Clear the student's gradients."""
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    def on_every_rank(self, *mine: float) -> list[float]:
        """Numbers of the student's first rank. Collective."""
        values = torch.tensor(mine, dtype=torch.float64, device=self.platform.device)
        dist.broadcast(values, src=self.student.grid.layout.first_rank)
        return values.tolist()

    def update(self) -> tuple[float, float]:
        """The optimizer's step. Returns (gradient norm before clipping, learning rate), on every rank. Collective."""
        values = [0.0, 0.0] if self.optimizer is None else [self.optimizer.step(), self.optimizer.lr]
        grad_norm, lr = self.on_every_rank(*values)
        return grad_norm, lr

    def refit(self, step: int, samples: list[Sample]) -> bool:
        """Fit the student's half of the bridge again on this step's text, if it is due (`bridge.refit_every`). The teacher's
        half stays, and so does the optimizer's state. Returns whether it did. Collective."""
        every, space = self.config.bridge.refit_every, self.alignment.space
        if not every or not step or step % every or not isinstance(space, LowRank):
            return False
        config = self.config
        if not space.is_watched:  # an MLP stays one
            mlp = config.bridge.model_copy(update={"projector": "mlp", "solver": "sgd"})
            config = config.model_copy(update={"bridge": mlp})
        stage = Stage1(self.alignment.teacher, self.student, self.alignment.pairs, config, self.platform)
        space.replace(replace(space.whole, student=stage.projections([samples], space.whole)))
        return True

    def sync(self, version: int, phase: Phases | None = None) -> Difference | None:
        """Give the engine the student's weights and prove that they arrived. Returns the probe's difference; None where text is
        recorded and there is no engine to give them to. Collective.

        Raises:
            WeightSyncError: the difference is above the tolerance.
        """
        if self.config.rollout.engine == "file":
            self.weight_version = version
            return None
        phase = phase or Phases(self.platform)
        with phase("rollout"):
            self.text.settle()
        with phase("sync"), together("weight sync"):
            sync_weights(self.text.engine, self.student, version)
        with phase("probe"):
            found = probe_difference(self.engine, self.student, self.platform, self.probe)
        differing = [] if is_within(found, self.tolerance) else differing_weights(self.engine, self.student)
        check_probe(found, self.tolerance, version, differing)
        self.weight_version = version
        return found

    def close(self) -> None:
        """Free the rollout engine's memory; no step can follow."""
        if self.engine is not None:
            self.engine.close()


def export_student(student: Model, source: Path, out_dir: Path, overwrite: bool) -> None:
    """Write the student as a Hugging Face directory beside the tokenizer files of the model `source`. Collective."""
    grid = student.grid
    with together(f"exporting to {out_dir}"):
        if grid.is_member and grid.coords.dp == grid.coords.cp == 0:
            export_hf(
                student.chunks,
                student.architecture,
                student.sharding,
                grid.groups.tp,
                grid.groups.pp,
                hf_dir_of(source),
                out_dir,
                is_writer=dist.get_rank() == grid.layout.first_rank,
                overwrite=overwrite,
            )
