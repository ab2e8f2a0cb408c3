"""The noise of a run's teachers on the run's own prompts: for the doctor, and before a training that asks for it."""

from __future__ import annotations

from collections.abc import Sequence

from oprd_megatron.models import DTYPES, Model, build_model
from oprd_megatron.noise.compare import Noise, compare
from oprd_megatron.noise.gate import NoiseGate
from oprd_megatron.platform import Platform
from oprd_megatron.preflight import Checked
from oprd_megatron.representation.alignment import Alignment
from oprd_megatron.representation.batch import Sample, filled_up
from oprd_megatron.rollout import Rollout

PROMPTS = 8
"""Prompts that noise is measured on, at least."""
MOST_TOKENS = 512
"""Of each, as many at most."""


def prompt_samples(checked: Checked) -> list[Sample]:
    """The run's first prompts as samples: the first quarter of each as what is read, the rest as what was answered, so that
    states are looked at on text that the run has."""
    rollouts = []
    for number, prompt in enumerate(checked.prompts[:PROMPTS]):
        text = prompt.token_ids[:MOST_TOKENS]
        cut = max(1, len(text) // 4)
        rollouts.append(Rollout(prompt.index, number, text[:cut], text[cut:], 0, finished=False))
    return checked.sample_maker(checked.prompts).of_student(rollouts)


def in_dtype(checked: Checked, teacher: Model, platform: Platform) -> Model:
    """The teacher once more on its own grid, with nothing in fp8 and no head."""
    section = checked.config.teacher
    return build_model(
        checked.teacher,
        teacher.grid,
        platform,
        dtype=DTYPES[section.dtype],
        hf_dir=section.path,
        frozen=True,
        head=False,
    )


def measure_noise(checked: Checked, alignment: Alignment, samples: Sequence[Sample], platform: Platform) -> Noise:
    """Noise of the alignment's teacher, which is in fp8. Collective. For the while the teacher is in memory twice, in fp8 and
    in dtype.

    Args:
        checked: the run as this teacher sees it.
        alignment: of the teacher and the student.
        samples: text.
        platform: of the run.
    """
    plan = alignment.plan(filled_up(samples, alignment.flow.planner.unit))
    exact = in_dtype(checked, alignment.teacher, platform)
    return compare(
        exact, alignment.teacher, plan, alignment.pairs, checked.config.distill, alignment.space.of_teacher, platform
    )


def measured_gate(checked: Checked, alignment: Alignment, samples: Sequence[Sample], platform: Platform) -> NoiseGate:
    """The gate of a teacher that is measured now; see `measure_noise`."""
    noise = measure_noise(checked, alignment, samples, platform)
    losses = {pair.student_layer: loss for pair, loss in zip(noise.pairs, noise.loss, strict=True)}
    return NoiseGate(losses, {pair.student_layer: pair.teacher_layer for pair in noise.pairs})
