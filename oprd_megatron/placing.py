"""Both models of a run on their grids."""

from __future__ import annotations

from checkpoints_conversion import Architecture
from oprd_megatron.config.schema import ModelConfig, StudentConfig
from oprd_megatron.models import DTYPES, Model, build_model
from oprd_megatron.parallel import GridLayout
from oprd_megatron.parallel.grid import build_grid, init_mcore_globals
from oprd_megatron.platform import Platform
from oprd_megatron.preflight import Checked


def build_models(checked: Checked, platform: Platform) -> tuple[Model, Model]:
    """Teacher (frozen) and student on their grids, weights loaded. Collective."""
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
        vocab_size=0 if checked.two_tokenizers else max(checked.teacher.vocab_size, checked.student.vocab_size),
        recompute=section.recompute if isinstance(section, StudentConfig) else None,
    )
