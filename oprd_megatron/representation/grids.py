"""Both models' grids of a run, from its config: each on its own, then together. Needs no process group."""

from __future__ import annotations

import logging

from checkpoints_conversion.architecture import Architecture
from oprd_megatron.config.schema import RunConfig
from oprd_megatron.errors import ConfigError
from oprd_megatron.parallel.layout import (
    GridLayout,
    check_experts,
    check_overlap,
    check_ranks,
    resolve_layout,
    tp_divisible,
)
from oprd_megatron.representation.batch import Planner, Sample
from oprd_megatron.representation.bridge import bridge_rank
from oprd_megatron.representation.layer_map import LayerPair, resolve_layer_pairs
from oprd_megatron.representation.outputs import Supervised, heads_at, output_wire
from oprd_megatron.representation.route import moved_tokens
from oprd_megatron.representation.wire import Wire, wire_name

logger = logging.getLogger(__name__)


def resolve_grids(
    config: RunConfig,
    teacher: Architecture,
    student: Architecture,
    world_size: int,
    width: int | None = None,
    alone: bool = True,
) -> tuple[GridLayout, GridLayout]:
    """The teacher's and the student's layout. `width` as in `planner`; unless `alone`, ranks may be other teachers'.

    Raises:
        LayoutError, ConfigError: one of them, or both together, cannot work.
    """
    student_layout = _resolve(config, "student", student, world_size)
    teacher_layout = _resolve(config, "teacher", teacher, world_size)
    (check_ranks if alone else check_overlap)(teacher_layout, student_layout, world_size)
    for layout in (teacher_layout, student_layout):
        _check_batch(config, layout)
    if config.teacher.parallel.layers_per_stage == "follow_student":
        pairs = resolve_layer_pairs(config.distill, student.num_layers, teacher.num_layers)
        config = config.model_copy(update={"distill": config.distill.model_copy(update={"spool_bytes": None})})
        even = teacher_layout  # planned without the budget, which these stages may not fit
        stages = follow_student(planner(config, pairs, teacher, even, student_layout, width), longest_samples(config))
        teacher_layout = _resolve(config, "teacher", teacher, world_size, stages)
        before, after = (
            sum(
                chunk.total_bytes(p.state_bytes, p.output_bytes)
                for p in [planner(config, pairs, teacher, layout, student_layout, width)]
                for chunk in p.plan(longest_samples(config)).chunks
            )
            for layout in (even, teacher_layout)
        )
        saved = f"{1 - after / before:.0%} less" if before else "as before"
        logger.info(
            "teacher.parallel.layers_per_stage: follow_student puts %s layers on its stages; %.1f MB a step travel, %s than "
            "with even stages (%.1f MB)", list(stages), after / 1e6, saved, before / 1e6,
        )  # fmt: skip
    return teacher_layout, student_layout


def planner(
    config: RunConfig,
    pairs: list[LayerPair],
    teacher: Architecture,
    teacher_layout: GridLayout,
    student_layout: GridLayout,
    width: int | None = None,
) -> Planner:
    """The planner of a run's training batches. `width` of the states on the wire, where it is not the config's bridge's rank
    or the teacher's width."""
    if width is None:
        bridge = config.distill.bridge
        width = bridge_rank(bridge) - config.distill.bridge_head if bridge else teacher.hidden_size
    wire = Wire(wire_name(config.distill, config.teacher.dtype), width)
    terms, of_teacher = config.output.terms, (config.teacher.dtype, teacher.hidden_size)
    heads = heads_at(config.output, teacher_layout, student_layout, *of_teacher)
    return Planner(
        pairs,
        teacher_layout,
        student_layout,
        config.distill,
        wire.state_bytes,
        config.run.micro_batch_size,
        config.run.micro_batch_tokens,
        predicted=Supervised(terms) if terms else None,
        output_bytes=output_wire(terms, heads, *of_teacher).state_bytes if terms else 0,
    )


def longest_samples(config: RunConfig) -> list[Sample]:
    """A training batch as long as the config allows: what budgets and plans are made for."""
    count = config.rollout.prompts_per_step * config.rollout.responses_per_prompt
    ids = (0,) * config.rollout.max_response_tokens
    return [Sample((0,) * config.rollout.prompts.max_tokens, ids)] * count


def check_budget(planner: Planner, config: RunConfig) -> None:
    """Refuse a spool budget that some batch of the run could not be cut down to.

    Raises:
        ConfigError: names a budget that always works.
    """
    budget, needed = config.distill.spool_bytes, planner.most_held_bytes(longest_samples(config)[0])
    if budget is not None and budget < needed:
        raise ConfigError(
            f"distill.spool_bytes: {int(budget)} may be below one micro-batch's states on a rank; use at least {needed}"
        )


def follow_student(planner: Planner, samples: list[Sample]) -> tuple[int, ...]:
    """Layers of each of the teacher's chunks such that the least travels, and among those the most even.

    Teacher layer phi(l) then lies on the stage that owns l wherever that is one of the teacher's ranks. A dynamic programme
    over (chunk, layers so far): a chunk of the model's order lives on stage chunk % pp and every layer there costs the tokens
    that would change ranks.
    """
    teacher, student = planner.teacher, planner.student
    chunk = planner.plan(samples).chunks[0]
    moved = moved_tokens(teacher, chunk.teacher.tokens, student, chunk.student.tokens)
    taught = [{student.stage_of(p.student_layer) for p in planner.pairs if p.teacher_layer == layer + 1}
              for layer in range(teacher.num_layers)]  # fmt: skip
    cost = [[sum(int(moved[stage, b]) for b in stages) for stage in range(teacher.pp)] for stages in taught]
    chunks, depth = len(teacher.layers_per_stage), teacher.num_layers
    best: list[dict[int, tuple[int, int, tuple[int, ...]]]] = [{0: (0, 0, ())}]
    for number in range(chunks):
        stage = number % teacher.pp
        row: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for start, (bytes_so_far, uneven, sizes) in best[-1].items():
            total = bytes_so_far
            for end in range(start + 1, depth - (chunks - number - 1) + 1):
                total += cost[end - 1][stage]
                candidate = (total, uneven + (end - start) ** 2, (*sizes, end - start))
                if end not in row or candidate < row[end]:
                    row[end] = candidate
        best.append(row)
    return best[-1][depth][2]


def _resolve(
    config: RunConfig, name: str, architecture: Architecture, world_size: int, stages: tuple[int, ...] | None = None
) -> GridLayout:
    section = config.teacher if name == "teacher" else config.student
    parallel = section.parallel
    if parallel.layers_per_stage == "follow_student":
        parallel = parallel.model_copy(update={"layers_per_stage": None})
    layout = resolve_layout(
        parallel,
        name=f"{name}.parallel",
        world_size=world_size,
        num_layers=architecture.num_layers,
        divisible=tp_divisible(architecture, section.pad_heads),
        layers_per_stage=stages,
        token_multiple=section.precision.token_multiple,
    )
    if name == "student":
        check_experts(layout, architecture, f"{name}.parallel")
    return layout


def _check_batch(config: RunConfig, layout: GridLayout) -> None:
    rollouts = config.rollout.prompts_per_step * config.rollout.responses_per_prompt
    unit = config.run.micro_batch_size * layout.dp
    if config.run.micro_batch_tokens is None and rollouts % unit:
        raise ConfigError(
            f"rollout.prompts_per_step x responses_per_prompt = {rollouts} is not a multiple of run.micro_batch_size "
            f"{config.run.micro_batch_size} x dp {layout.dp} = {unit}; change one of them or set run.micro_batch_tokens"
        )
