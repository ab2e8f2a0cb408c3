"""What can be known to be wrong with several teachers together, once each by itself is found sound (`preflight.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from oprd_megatron.config import RunConfig
from oprd_megatron.config.schema import needs_teacher_head
from oprd_megatron.errors import ConfigError, DataError
from oprd_megatron.parallel.layout import check_idle
from oprd_megatron.parallel.memory import ModelMemory
from oprd_megatron.rollout.prompts import Prompt

if TYPE_CHECKING:
    from oprd_megatron.preflight import Checked


def check_together(config: RunConfig, views: Mapping[str, Checked], padded_vocab_size: int, world_size: int) -> None:
    """Every rank has a model, and teachers that take turns on the device have room in host memory.

    Args:
        config: the run.
        views: {name: the run with this teacher alone}.
        padded_vocab_size: of all models.
        world_size: ranks that there will be.

    Raises:
        LayoutError, ConfigError: one line.
    """
    student = next(iter(views.values())).student_layout
    layouts = {f"teacher {name}": view.teacher_layout for name, view in views.items()}
    check_idle({**layouts, "student": student}, world_size)
    assert config.teaching is not None
    budget = config.teaching.host_budget
    needed = [sum(weight_bytes(view, padded_vocab_size, rank) for view in views.values()) for rank in range(world_size)]
    if budget is not None and max(needed) > budget:
        raise ConfigError(
            f"teaching.host_budget: {int(budget)} is below the {max(needed)} bytes of the teachers' weights on rank "
            f"{needed.index(max(needed))}; raise it, spread the teachers over more ranks, or leave it out"
        )


def weight_bytes(view: Checked, padded_vocab_size: int, rank: int) -> int:
    """Bytes of a teacher's weights on a rank."""
    layout, dtype = view.teacher_layout, view.config.teacher.dtype
    if rank not in layout.ranks:
        return 0
    precision, has_head = view.config.teacher.precision, needs_teacher_head(view.config)
    memory = ModelMemory(
        view.teacher, layout, dtype, padded_vocab_size, trained=False, precision=precision, has_head=has_head
    )
    chunks = [memory.chunk_parameters(layout.coords(rank).pp, chunk) for chunk in range(layout.vpp)]
    return sum(map(memory.frozen_bytes, chunks))


def deal_prompts(
    config: RunConfig, views: Mapping[str, Checked], prompts: list[Prompt], held_out: list[Prompt]
) -> dict[str, Checked]:
    """The views, each with the prompts that its teacher teaches. A teacher may be without held-out ones.

    Raises:
        DataError: a teacher has nothing to teach.
    """
    dealt = {}
    for name, view in views.items():
        mine, asked = ([p for p in some if p.source in ("", name)] for some in (prompts, held_out))
        if not mine:
            raise DataError(
                f"{config.rollout.prompts.path}: no prompt goes to the teacher {name}; look at teaching.field and "
                "teaching.to, or leave the teacher out"
            )
        dealt[name] = replace(view, prompts=mine, held_out=asked)
    return dealt
