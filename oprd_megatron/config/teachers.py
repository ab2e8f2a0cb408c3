"""Several teachers in one run: who teaches which prompt, and where the others wait.

`RunConfig.teacher` stays what a run with one teacher reads. With `teachers` it is the first of them, and
`RunConfig.of_teacher(name)` is the run as one of them sees it. On the command line `teacher=NAME` makes a run of that one
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, Field, ValidationError, model_validator

from oprd_megatron.config.base import NonNegative, Strict
from oprd_megatron.config.distill import DistillConfig
from oprd_megatron.errors import ConfigError

if TYPE_CHECKING:
    from oprd_megatron.config.schema import RunConfig


class Named(Strict):
    """What one of several teachers has besides a model's settings."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    """Name in the metrics and in `teaching.to`."""
    weight: NonNegative = 1.0
    """by: average only: factor on this teacher's loss, divided by the sum of all weights."""
    distill: DistillConfig = DistillConfig()
    """Keys of `distill` that are other for this teacher; what is left out is as in the run's `distill`."""


class TeachingConfig(Strict):
    """Which teacher teaches which prompt."""

    by: Literal["source", "sample", "average"]
    """source: the teacher that `to` gives for the value of `field` in the prompt's row. sample: the teacher that `field` names.
    average: all teachers teach every sample, and their losses are averaged with their weights."""
    field: str = "data_source"
    """Name of the field or column; not read with by: average."""
    to: dict[str, str] = {}  # noqa: RUF012 (pydantic copies it)
    """by: source only: {value of `field`: teacher}. A value that is a teacher's name needs no entry."""
    host_budget: Annotated[ByteSize, Field(gt=0)] | None = None
    """Teachers take turns on the device: each is there while it teaches, and all wait in host memory (pinned, on CUDA) in
    between, of which a rank may use this much. Left out, all stay on the device."""

    @model_validator(mode="after")
    def _check(self) -> TeachingConfig:
        if self.to and self.by != "source":
            raise ValueError(f"to: is for by: source, not by: {self.by}; leave it out")
        return self


def settle(values: Any) -> Any:
    """A run's values with `teachers` as one-teacher code wants them: `teacher` is the first, and every teacher's `distill` is
    whole. With `teacher: NAME` only that one is left. What is malformed stays as it is, for the schema to refuse.

    Raises:
        ValueError: `teacher` says something else than `teachers`.
    """
    entries = values.get("teachers") if isinstance(values, dict) else None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        return values
    teacher, common = values.get("teacher"), values.get("distill") or {}
    if isinstance(teacher, dict) and "path" not in teacher:
        raise ValueError("teacher: the run has `teachers`; set its keys there, or choose one of them with teacher=NAME")
    if _is_sound(common):
        entries = [_whole(entry, common) for entry in entries]
    if not isinstance(teacher, str):
        return {**values, "teachers": entries, "teacher": teacher or _model(entries[0])}
    chosen = next((entry for entry in entries if entry.get("name") == teacher), None)
    if chosen is None:
        names = ", ".join(str(entry.get("name")) for entry in entries)
        raise ValueError(f"teacher: no {teacher!r} among the run's teachers ({names})")
    rest = {key: value for key, value in values.items() if key not in ("teachers", "teaching")}
    return {**rest, "teacher": _model(chosen), "distill": chosen.get("distill", common)}


def _whole(entry: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    """A teacher with the run's `distill` under its own."""
    own = entry.get("distill") or {}
    return {**entry, "distill": {**common, **own}} if isinstance(own, dict) else entry


def _model(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in Named.model_fields}


def _is_sound(distill: Any) -> bool:
    """Whether the run's own `distill` reads well; else its mistake is told once, and not for each teacher."""
    try:
        DistillConfig.model_validate(distill)
    except ValidationError:
        return False
    return True


def alone(teachers: Sequence[Any], name: str, model: type[BaseModel]) -> dict[str, Any]:
    """What makes a run with several teachers one with the teacher of this name; `model` is the type of `teacher`."""
    entry = next(entry for entry in teachers if entry.name == name)
    teacher = model(**{key: getattr(entry, key) for key in type(entry).model_fields if key not in Named.model_fields})
    return {"teacher": teacher, "distill": entry.distill, "teachers": [], "teaching": None}


def check_teachers(config: RunConfig) -> None:
    """Teachers go with each other and with the run.

    Raises:
        ValueError: one line that names the key.
    """
    teachers, teaching = config.teachers, config.teaching
    names = [teacher.name for teacher in teachers]
    if bool(teachers) != (teaching is not None):
        raise ValueError(
            "teachers and teaching go together; give both (teaching.by: source, sample or average), or neither"
        )
    if teaching is None:
        return
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"teachers: two are called {twice}; give them different names")
    if config.teacher.model_dump() != config.of_teacher(names[0]).teacher.model_dump():
        raise ValueError(
            "teacher: is not the first of `teachers`; leave it out (ema_decay works with one teacher only)"
        )
    unknown = next((item for item in teaching.to.items() if item[1] not in names), None)
    if unknown:
        raise ValueError(f"teaching.to: {unknown[0]} goes to {unknown[1]!r}, which is no teacher ({', '.join(names)})")
    if teaching.by == "average" and not sum(teacher.weight for teacher in teachers):
        raise ValueError("teachers: their weights sum to 0; give one a weight above 0")
    for number, teacher in enumerate(teachers):
        if teaching.by != "average" and teacher.weight != 1:
            raise ValueError(f"teachers[{number}].weight: is for teaching.by: average; leave it out")
        if teacher.distill.space == "linear":
            raise ValueError(
                f"teachers[{number}].distill.mode: linear trains one map for each student layer and works with one teacher "
                "only; use a bridge"
            )
        if teacher.distill.cross_tokenizer:
            raise ValueError(f"teachers[{number}].distill.cross_tokenizer: works with one teacher only; leave it out")
        if teaching.host_budget is not None and teacher.precision.linear == "fp8":
            raise ValueError(
                f"teachers[{number}].precision.linear: fp8 cannot wait in host memory (Transformer Engine keeps it on the "
                "device); use weight_only, or leave teaching.host_budget out"
            )
        _check_alone(config.of_teacher(teacher.name), number)
    if config.bridge.refit_every:
        raise ValueError("bridge.refit_every: works with one teacher only; leave it out")
    sections = {"rollout": config.rollout.prompts, **({"eval": config.eval.prompts} if config.eval else {})}
    for section, prompts in sections.items():
        if prompts.teacher_template is not None:
            raise ValueError(f"{section}.prompts.teacher_template: works with one teacher only; leave it out")


def _check_alone(run: RunConfig, number: int) -> None:
    try:
        type(run)._check(run)  # type: ignore[operator]
    except ValueError as error:
        raise ValueError(f"teachers[{number}]: {error}") from None


def refuse_several(config: RunConfig, command: str) -> None:
    """For what looks at one teacher.

    Raises:
        ConfigError: the config names several.
    """
    if config.teachers:
        names = [teacher.name for teacher in config.teachers]
        raise ConfigError(
            f"{command} looks at one teacher, and the config names {', '.join(names)}; choose one with teacher={names[0]}"
        )
