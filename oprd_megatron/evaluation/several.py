"""The held-out evaluation of a run, whatever the number of its teachers: each answers the prompts that it teaches, and the
student is scored against it there. The run's figures are means over all tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from oprd_megatron.evaluation.held_out import HeldOut
from oprd_megatron.lesson import mean_by
from oprd_megatron.models import Model
from oprd_megatron.placing import PlacedTeacher
from oprd_megatron.platform import Platform
from oprd_megatron.preflight import Checked
from oprd_megatron.rollout import RolloutEngine

MEANS = ("kl", "cross_entropy", "student_entropy", "teacher_entropy", "top_overlap", "cosine")


class Evaluation:
    """Every method is collective.

    Args:
        checked: from `preflight`; its config has an eval section.
        teachers, student: from `build_all`.
        platform: of this rank.
    """

    def __init__(self, checked: Checked, teachers: Sequence[PlacedTeacher], student: Model, platform: Platform) -> None:
        self.has_several = bool(checked.views)
        self.teachers = [teacher for teacher in teachers if teacher.checked.held_out]
        self.held_out: list[HeldOut] = []
        for teacher in self.teachers:
            with teacher.at_work():
                self.held_out.append(HeldOut(teacher.checked, teacher.model, student, platform, teacher.space))

    def due(self, step: int, last: int) -> bool:
        """As `HeldOut.due`."""
        return self.held_out[0].due(step, last)

    def record(self, step: int, engine: RolloutEngine | None, samples: bool = False) -> dict[str, Any]:
        """As `HeldOut.record`; of several teachers also {"teachers": {name: its own}}, which then has layers and curves."""
        records = {}
        for teacher, held_out in zip(self.teachers, self.held_out, strict=True):
            with teacher.at_work():
                records[teacher.name] = held_out.record(step, engine, samples)
        return combined(records) if self.has_several else records["teacher"]


def combined(records: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """One eval record of several teachers': means by tokens, and each teacher's own."""
    found = list(records.values())
    tokens = [record["tokens"] for record in found]
    names = dict.fromkeys(name for record in found for name in record["terms"])
    apart = ("kind", "step", "samples")
    whole: dict[str, Any] = {
        "kind": "eval",
        "step": found[0]["step"],
        **{key: mean_by([record[key] for record in found], tokens) for key in MEANS},
        "terms": {name: mean_by([record["terms"].get(name) for record in found], tokens) for name in names},
        "tokens": sum(tokens),
        "seconds": sum(record["seconds"] for record in found),
        "teachers": {
            name: {key: value for key, value in record.items() if key not in apart} for name, record in records.items()
        },
    }
    if "samples" in found[0]:
        whole["samples"] = [
            {**sample, "taught_by": name} for name, record in records.items() for sample in record["samples"]
        ]
    return whole
