"""Held-out evaluation: how far the student is from the teacher on text that the teacher wrote.

The teacher answers the held-out prompts once, sampled with a fixed seed. On these answers, per token:
KL(teacher || student) over the whole vocabulary, the student's cross-entropy, and the cosine of every supervised layer
pair at the run's own positions. The answers are scored a few micro-batches at a time, so that memory does not
grow with their number, and by one forward of each model: the head is applied to final hidden states in chunks of tokens.
Models with different tokenizers have no KL: their vocabularies have nothing in common.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from oprd_megatron.config.distill import DistillConfig
from oprd_megatron.evaluation.curves import CosineCurves
from oprd_megatron.evaluation.outputs import OutputMeasures
from oprd_megatron.models import Model
from oprd_megatron.platform import Platform
from oprd_megatron.preflight import Checked
from oprd_megatron.representation.alignment import Alignment
from oprd_megatron.representation.batch import Sample, filled_up
from oprd_megatron.representation.flow import Passes
from oprd_megatron.representation.space import Space
from oprd_megatron.rollout import Rollout, RolloutEngine, SamplingParams
from oprd_megatron.rollout.build import build_hf_engine
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
        distill = measured_states(checked.config.distill, teacher, student)
        self.outputs = OutputMeasures(
            teacher, student, platform.device, not checked.two_tokenizers, checked.config.output.terms
        )
        self.alignment = Alignment(
            teacher, student, distill, platform, self.config.micro_batch_size,
            space=space if distill.space == checked.config.distill.space else None, signal=self.outputs.signal,
        )  # fmt: skip
        engine = build_hf_engine(checked.config, checked.config.teacher, teacher.grid.layout, platform)
        sync_weights(engine, teacher, version=0)
        self.sampling = SamplingParams(
            temperature=self.config.temperature,
            max_response_tokens=self.config.max_response_tokens,
            seed=checked.config.run.seed,
            vocab_size=checked.student_vocab_size,
        )
        theirs = self.sampling
        if checked.two_tokenizers:
            theirs = replace(theirs, vocab_size=checked.teacher.vocab_size)
        asked = [replace(prompt, token_ids=prompt.teacher_ids or prompt.token_ids) for prompt in self.prompts]
        rollouts = collect_rollouts(engine, asked, 1, theirs, step=0)
        if engine is not None:
            engine.close()
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
        record = evaluate(self.alignment, self.outputs, self.answers, step)
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


def measured_states(config: DistillConfig, teacher: Model, student: Model) -> DistillConfig:
    """What an evaluation aligns: as the run does. A run that aligns nothing is still measured where widths are equal. No
    budget: what is scored at a time is small."""
    equal = teacher.architecture.hidden_size == student.architecture.hidden_size
    mode = "identity" if config.space == "none" and equal else config.mode
    return config.model_copy(update={"mode": mode, "spool_bytes": None})


def evaluate(alignment: Alignment, outputs: OutputMeasures, answers: Sequence[Sample], step: int) -> dict[str, Any]:
    """Score the student on the teacher's answers. Collective; every rank returns the same record.

    Args:
        alignment: teacher and student, with the signal of `outputs`; its `micro_batch_size` is the number of answers scored
            at a time.
        outputs: measures both models' outputs.
        answers: the teacher's answers to the held-out prompts.
        step: finished training steps.

    Returns:
        {"kind": "eval", "step", "kl", "cross_entropy", "student_entropy", "teacher_entropy", "top_overlap", "terms", "cosine",
        "tokens", "seconds", "layers": {..}, "curves": {..}}; nats a token of the student's; kl, teacher_entropy and top_overlap
        are None with two tokenizers; "terms" has the loss's, the representation loss (without coefficient and layer weights) as
        "oprd". Answers that are scored together are left out if none of their tokens is aligned.
    """
    start = time.perf_counter()
    outputs.clear()
    curves = CosineCurves(
        alignment.config, max(len(answer.response_ids) for answer in answers), alignment.platform.device
    )
    sums: dict[int, torch.Tensor] = {}
    portions = list(_portions(answers, alignment))
    aligned = [samples for samples in portions if alignment.flow.planner.num_tokens(samples)]
    for samples in aligned or portions[:1]:  # if nothing at all is aligned, planning refuses it
        passes = Passes(on_outputs=outputs.on_outputs)
        layer_sums = alignment.run(alignment.plan(samples), passes, cosines_of=curves.of_chunk)
        for layer, value in layer_sums.items():
            sums[layer] = sums.get(layer, 0) + value
    report, found = alignment.reduce(sums), outputs.record()
    if report.student_layers:
        found["terms"] = {"oprd": sum(report.layer_loss) / len(report.layer_loss), **found["terms"]}
    return {
        "kind": "eval",
        "step": step,
        **found,
        "cosine": report.mean_cosine,
        "seconds": time.perf_counter() - start,
        "layers": report.by_layer(),
        "curves": curves.record() if report.student_layers else None,
    }


def _portions(answers: Sequence[Sample], alignment: Alignment) -> Iterator[list[Sample]]:
    """Answers in portions that fill the pipelines once; the last is filled up with samples without a response, which are
    not scored."""
    layouts = alignment.teacher.grid.layout, alignment.student.grid.layout
    unit = alignment.flow.planner.unit
    size = unit * max(layout.pp * layout.vpp for layout in layouts)
    for first in range(0, len(answers), size):
        yield filled_up(answers[first : first + size], unit)
