"""The models of a run on their grids."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from checkpoints_conversion import Architecture
from oprd_megatron.config.schema import ModelConfig, RunConfig, StudentConfig, needs_teacher_head
from oprd_megatron.models import DTYPES, Model, build_model
from oprd_megatron.models.residence import Residence
from oprd_megatron.parallel import GridLayout
from oprd_megatron.parallel.agreement import together
from oprd_megatron.parallel.grid import build_grid, init_mcore_globals
from oprd_megatron.platform import Platform
from oprd_megatron.preflight import Checked
from oprd_megatron.representation.flow import Phase
from oprd_megatron.representation.space import Space, build_space


@dataclass(frozen=True)
class PlacedTeacher:
    """One teacher of a run, loaded.

    Attributes:
        name: as in the config; `teacher` in a run with one.
        checked: the run as it sees it.
        model: frozen.
        space: in which its states are compared with the student's.
        weight: its share of the loss where several teach the same samples; else 1.
        residence: brings it to the device and away; None where it stays.
    """

    name: str
    checked: Checked
    model: Model
    space: Space
    weight: float = 1.0
    residence: Residence | None = None

    @classmethod
    def of_one(cls, checked: Checked, model: Model, student: Model, platform: Platform) -> PlacedTeacher:
        """The only teacher of a run."""
        space = build_space(checked.config.distill, checked.pairs, model, student, platform.device)
        return cls("teacher", checked, model, space)

    @contextlib.contextmanager
    def at_work(self, phase: Phase = lambda name: contextlib.nullcontext()) -> Iterator[None]:
        """For the length of the block, the weights are on the device. Collective if teachers take turns; `phase` then times
        the way back as "swap".

        Raises:
            TeacherWeightsError: on every rank, if on any they came back changed.
        """
        if self.residence is None:
            yield
            return
        with phase("swap"), together(f"bringing back the teacher {self.name}"):
            self.residence.come_back()
        yield
        self.residence.leave()


def build_all(checked: Checked, platform: Platform) -> tuple[list[PlacedTeacher], Model]:
    """The teachers (frozen) and the student on their grids, weights loaded. Collective."""
    config, placed = checked.config, []
    waits = config.teaching is not None and config.teaching.host_budget is not None
    for name, view in checked.lessons.items():
        model = place_model(checked, view.config.teacher, view.teacher, view.teacher_layout, platform, frozen=True)
        residence = Residence(model, name) if waits else None
        if residence is not None:
            residence.leave()
        placed.append((name, view, model, residence))
    student = place_model(checked, config.student, checked.student, checked.student_layout, platform, frozen=False)
    shares = weights_of(config)
    return [
        PlacedTeacher(
            name, view, model, build_space(view.config.distill, view.pairs, model, student, platform.device),
            shares.get(name, 1.0), residence,
        )
        for name, view, model, residence in placed
    ], student  # fmt: skip


def weights_of(config: RunConfig) -> dict[str, float]:
    """{teacher: share of the loss} where several teach the same samples; else nothing."""
    if config.teaching is None or config.teaching.by != "average":
        return {}
    total = sum(teacher.weight for teacher in config.teachers)
    return {teacher.name: teacher.weight / total for teacher in config.teachers}


def build_models(checked: Checked, platform: Platform) -> tuple[Model, Model]:
    """The one teacher (frozen) and the student on their grids, weights loaded. Collective."""
    config = checked.config
    teacher = place_model(checked, config.teacher, checked.teacher, checked.teacher_layout, platform, frozen=True)
    return teacher, place_model(
        checked, config.student, checked.student, checked.student_layout, platform, frozen=False
    )


def place_model(
    checked: Checked,
    section: ModelConfig,
    architecture: Architecture,
    layout: GridLayout,
    platform: Platform,
    frozen: bool,
) -> Model:
    """One model of a run on a grid of its own. Collective. Vocabularies are padded alike, whichever model it is, unless they
    are of different tokenizers."""
    with platform.scope():
        grid = build_grid(layout)
        init_mcore_globals(checked.config.run.seed, grid.coords.tp if grid.is_member else 0)
    return build_model(
        architecture,
        grid,
        platform,
        dtype=DTYPES[section.dtype],
        hf_dir=section.path,
        frozen=frozen,
        vocab_size=checked.padded_vocab_size,
        recompute=section.recompute if isinstance(section, StudentConfig) else None,
        precision=section.precision,
        head=not frozen or needs_teacher_head(checked.config),
    )
