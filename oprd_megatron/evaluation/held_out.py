"""Held-out evaluation: how far the student is from the teacher on text that the teacher wrote.

The teacher answers the held-out prompts once, sampled with a fixed seed. On these answers, per token:
KL(teacher || student) over the whole vocabulary, the student's cross-entropy, and the cosine of every supervised layer
pair at the run's own positions. The answers are scored a few micro-batches at a time, so that memory does not
grow with their number, and by one forward of each model: the head is applied to final hidden states in chunks of tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

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
    """

    def __init__(self, checked: Checked, teacher: Model, student: Model, platform: Platform) -> None:
        assert checked.config.eval is not None
        self.config, self.prompts, self.tokenizer = checked.config.eval, checked.held_out, checked.tokenizer
        self.alignment = Alignment(teacher, student, checked.config.distill, platform, self.config.micro_batch_size)
        engine = build_engine(checked.config, checked.config.teacher, teacher.grid.layout, platform)
        sync_weights(engine, teacher, version=0)
        self.sampling = SamplingParams(
            temperature=self.config.temperature,
            max_response_tokens=self.config.max_response_tokens,
            seed=checked.config.run.seed,
            vocab_size=checked.shared_vocab_size,
        )
        rollouts = collect_rollouts(engine, self.prompts, 1, self.sampling, step=0)
        if engine is not None:
            engine.close()
        self.head = teacher_head(teacher, student)
        self.answers = [Sample(rollout.prompt_ids, rollout.response_ids) for rollout in rollouts]

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
        cross_entropy in nats a token.
    """
    start = time.perf_counter()
    head = teacher_head(alignment.teacher, alignment.student) if head is None else head
    totals = torch.zeros(3, dtype=torch.float64)
    sums: dict[int, torch.Tensor] = {}
    for samples in _portions(answers, alignment):
        part, layer_sums = _score(alignment, samples, head)
        totals += part
        for layer, value in layer_sums.items():
            sums[layer] = sums.get(layer, 0) + value
    report = alignment.reduce(sums)
    dist.all_reduce(totals)
    divergence, cross_entropy, tokens = totals.tolist()
    return {
        "kind": "eval",
        "step": step,
        "kl": divergence / tokens,
        "cross_entropy": cross_entropy / tokens,
        "cosine": report.mean_cosine,
        "tokens": int(tokens),
        "seconds": time.perf_counter() - start,
        "layers": {"student": report.student_layers, "teacher": report.teacher_layers, "cosine": report.cosine},
    }


def _portions(answers: Sequence[Sample], alignment: Alignment) -> Iterator[list[Sample]]:
    """Answers in portions that fill the pipelines once; the last is filled up with samples without a response, which are
    not scored."""
    layouts = alignment.teacher.grid.layout, alignment.student.grid.layout
    unit = alignment.flow.planner.micro_batch_size * math.lcm(*(layout.dp for layout in layouts))
    size = unit * max(layout.pp * layout.vpp for layout in layouts)
    for first in range(0, len(answers), size):
        portion = list(answers[first : first + size])
        filler = Sample(portion[0].prompt_ids, ())
        yield portion + [filler] * (-len(portion) % unit)


def _score(
    alignment: Alignment, samples: list[Sample], head: torch.Tensor | None
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """This rank's [KL, cross-entropy, tokens] sums (on one rank of each tensor-parallel group) and layer sums."""
    plan, grid, device = alignment.plan(samples), alignment.student.grid, alignment.platform.device
    teachers = [TeacherFinals(alignment.teacher, alignment.student, chunk, device) for chunk in plan.chunks]
    students = [
        FinalStates(alignment.student, chunk.samples, chunk.student.arrangement, finals.route.order)
        for chunk, finals in zip(plan.chunks, teachers, strict=True)
        if grid.is_member
    ]
    layer_sums = alignment.run(
        plan,
        train=False,
        on_teacher_output=[finals.on_output for finals in teachers],
        on_student_output=[finals.on_output for finals in students],
    )
    totals = torch.zeros(3, dtype=torch.float64)
    for number, finals in enumerate(teachers):
        teacher_states = finals.states()
        if head is not None and teacher_states is not None:
            totals += _divergence(alignment, (teacher_states, head), students[number])
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
