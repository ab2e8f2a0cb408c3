"""Held-out evaluation: how far the student is from the teacher on text that the teacher wrote.

The teacher answers the held-out prompts once, sampled with a fixed seed. On these answers, per token:
KL(teacher || student) over the whole vocabulary, the student's cross-entropy, and the cosine of every supervised layer
pair at the run's own positions. The answers are scored a few micro-batches at a time, so that memory does not
grow with their number, and by one forward of each model: the head is applied to final hidden states in chunks of tokens.
Models with different tokenizers have no KL: their vocabularies have nothing in common.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from oprd_megatron.models import Model
from oprd_megatron.objectives.final_states import (
    FinalStates,
    TeacherFinals,
    head_log_probs,
    teacher_head,
)
from oprd_megatron.objectives.vocab_parallel import vocab_parallel_gather, vocab_parallel_kl
from oprd_megatron.platform import Platform
from oprd_megatron.preflight import Checked
from oprd_megatron.representation.alignment import Alignment
from oprd_megatron.representation.batch import Sample
from oprd_megatron.representation.flow import Passes
from oprd_megatron.representation.space import Space
from oprd_megatron.rollout import Rollout, RolloutEngine, SamplingParams
from oprd_megatron.rollout.build import build_engine
from oprd_megatron.rollout.collect import collect_rollouts
from oprd_megatron.rollout.weight_sync import sync_weights


class HeldOut:
    """The held-out evaluation of one run. Every method is collective.

    Args:
        checked: from `preflight`; its config has an eval section.
        teacher, student: the models.
        platform: of this rank.
        space: the run's, in which states are compared; left out, it is built as the config says.
    """

    def __init__(
        self, checked: Checked, teacher: Model, student: Model, platform: Platform, space: Space | None = None
    ) -> None:
        assert checked.config.eval is not None
        self.config, self.prompts, self.tokenizer = checked.config.eval, checked.held_out, checked.tokenizer
        self.alignment = Alignment(
            teacher, student, checked.config.distill, platform, self.config.micro_batch_size, space=space
        )
        engine = build_engine(checked.config, checked.config.teacher, teacher.grid.layout, platform)
        sync_weights(engine, teacher, version=0)
        self.sampling = SamplingParams(
            temperature=self.config.temperature,
            max_response_tokens=self.config.max_response_tokens,
            seed=checked.config.run.seed,
            vocab_size=checked.student_vocab_size,
        )
        both, theirs, asked = checked.two_tokenizers, self.sampling, self.prompts
        if both:
            theirs = replace(theirs, vocab_size=checked.teacher.vocab_size)
            asked = [replace(prompt, token_ids=prompt.teacher_ids) for prompt in asked]
        rollouts = collect_rollouts(engine, asked, 1, theirs, step=0)
        if engine is not None:
            engine.close()
        self.head = None if both else teacher_head(teacher, student)
        self.answers = checked.sample_maker(self.prompts).of_teacher(rollouts)

    def due(self, step: int, last: int) -> bool:
        """Whether to evaluate after `step` finished steps of a run of `last`."""
        return step == last or (self.config.every > 0 and step % self.config.every == 0)

    def record(self, step: int, engine: RolloutEngine | None, samples: bool = False) -> dict[str, Any]:
        """The eval record of `evaluate`.

        Args:
            step: finished training steps.
            engine: this rank's engine with the student's weights, if it holds one.
            samples: add answers of the student for people to read.
        """
        record = evaluate(self.alignment, self.answers, step, self.head)
        if samples:
            record["samples"] = self._samples(engine)
        return record

    def _samples(self, engine: RolloutEngine | None) -> list[dict[str, str]]:
        """The first prompts with the student's greedy answers and the teacher's."""
        params = replace(self.sampling, temperature=0.0)
        rollouts = collect_rollouts(engine, self.prompts[: self.config.samples], 1, params, step=0)
        return [
            {"prompt": prompt.text, "response": self._text(rollout), "teacher": self._text(answer)}
            for prompt, rollout, answer in zip(self.prompts, rollouts, self.answers, strict=False)
        ]

    def _text(self, answer: Rollout | Sample) -> str:
        return str(self.tokenizer.decode(list(answer.response_ids), skip_special_tokens=True))


def evaluate(
    alignment: Alignment, answers: Sequence[Sample], step: int, head: torch.Tensor | None = None
) -> dict[str, Any]:
    """Score the student on the teacher's answers. Collective; every rank returns the same record.

    Args:
        alignment: teacher and student; its `micro_batch_size` is the number of answers scored at a time.
        answers: the teacher's answers to the held-out prompts.
        step: finished training steps.
        head: from `teacher_head`, if it is at hand.

    Returns:
        {"kind": "eval", "step", "kl", "cross_entropy", "cosine", "tokens", "seconds", "layers": {..}}; kl and
        cross_entropy in nats a token of the student's; kl is None with two tokenizers. Answers that are scored together are
        left out if none of their tokens is aligned.
    """
    start = time.perf_counter()
    comparable = all(answer.teacher is None for answer in answers)
    if comparable and head is None:
        head = teacher_head(alignment.teacher, alignment.student)
    totals = torch.zeros(3, dtype=torch.float64)
    sums: dict[int, torch.Tensor] = {}
    portions = list(_portions(answers, alignment))
    aligned = [samples for samples in portions if alignment.flow.planner.num_tokens(samples)]
    for samples in aligned or portions[:1]:  # if nothing at all is aligned, planning refuses it
        part, layer_sums = _score(alignment, samples, head, comparable)
        totals += part
        for layer, value in layer_sums.items():
            sums[layer] = sums.get(layer, 0) + value
    report = alignment.reduce(sums)
    dist.all_reduce(totals)
    divergence, cross_entropy, tokens = totals.tolist()
    return {
        "kind": "eval",
        "step": step,
        "kl": divergence / tokens if comparable else None,
        "cross_entropy": cross_entropy / tokens,
        "cosine": report.mean_cosine,
        "tokens": int(tokens),
        "seconds": time.perf_counter() - start,
        "layers": {
            "student": report.student_layers,
            "teacher": report.teacher_layers,
            "cosine": report.cosine,
            **({} if report.inside is None else {"inside": report.inside}),
        },
    }


def _portions(answers: Sequence[Sample], alignment: Alignment) -> Iterator[list[Sample]]:
    """Answers in portions that fill the pipelines once; the last is filled up with samples without a response, which are
    not scored."""
    layouts = alignment.teacher.grid.layout, alignment.student.grid.layout
    unit = alignment.flow.planner.micro_batch_size * math.lcm(*(layout.dp for layout in layouts))
    size = unit * max(layout.pp * layout.vpp for layout in layouts)
    for first in range(0, len(answers), size):
        portion = list(answers[first : first + size])
        filler = replace(portion[0], response_ids=(), kept=())
        yield portion + [filler] * (-len(portion) % unit)


def _score(
    alignment: Alignment, samples: list[Sample], head: torch.Tensor | None, comparable: bool
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """This rank's [KL, cross-entropy, tokens] sums (on one rank of each tensor-parallel group) and layer sums."""
    plan, grid, device = alignment.plan(samples), alignment.student.grid, alignment.platform.device
    teachers = [TeacherFinals(alignment.teacher, alignment.student, chunk, device)
                for chunk in plan.chunks] if comparable else []  # fmt: skip
    orders: list[np.ndarray | None] = (
        [finals.route.order for finals in teachers] if comparable else [None] * len(plan.chunks)
    )
    students = [
        FinalStates(alignment.student, chunk.samples, chunk.student.arrangement, order)
        for chunk, order in zip(plan.chunks, orders, strict=True)
        if grid.is_member
    ]
    passes = Passes(
        on_teacher_output=[finals.on_output for finals in teachers] or None,
        on_student_output=[finals.on_output for finals in students],
    )
    layer_sums = alignment.run(plan, passes)
    totals = torch.zeros(3, dtype=torch.float64)
    for finals in teachers:
        teacher_states = finals.states()  # collective, also where there is nothing to score
        if grid.is_last_stage:
            assert teacher_states is not None and head is not None
            totals += _divergence(alignment, (teacher_states, head), students.pop(0))
    for left in students if grid.is_last_stage else []:
        totals += _cross_entropy(alignment, left)
    counts = grid.is_member and grid.coords.tp == 0
    return totals if counts else torch.zeros(3, dtype=torch.float64), layer_sums


def _divergence(alignment: Alignment, teacher: tuple[torch.Tensor, torch.Tensor], student: FinalStates) -> torch.Tensor:
    """[KL, cross-entropy, tokens] sums over this rank's response tokens; `teacher` is (states, head)."""
    vocab = min(alignment.teacher.architecture.vocab_size, alignment.student.architecture.vocab_size)
    group, totals = alignment.student.grid.groups.tp, torch.zeros(3, dtype=torch.float64)
    heads = teacher, (student.states(), alignment.student.head_weight)
    log_probs = [head_log_probs(states, weight, vocab, group) for states, weight in heads]
    for log_p, log_q, ids in zip(*log_probs, student.target_chunks(), strict=True):
        divergence = vocab_parallel_kl(log_p, log_q, group).double().sum()
        cross_entropy = -vocab_parallel_gather(log_q, ids, group).double().sum()
        totals += torch.tensor([divergence, cross_entropy, len(ids)], dtype=torch.float64)
    return totals


def _cross_entropy(alignment: Alignment, student: FinalStates) -> torch.Tensor:
    """[0, cross-entropy, tokens] sums over this rank's response tokens, where there is no teacher to diverge from."""
    group, totals = alignment.student.grid.groups.tp, torch.zeros(3, dtype=torch.float64)
    vocab = alignment.student.architecture.vocab_size
    log_probs = head_log_probs(student.states(), alignment.student.head_weight, vocab, group)
    for log_q, ids in zip(log_probs, student.target_chunks(), strict=True):
        cross_entropy = -vocab_parallel_gather(log_q, ids, group).double().sum()
        totals += torch.tensor([0.0, cross_entropy, len(ids)], dtype=torch.float64)
    return totals
