"""From a config to the figures of its plan. A run's own planner plans here, so what is printed is what would travel."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from checkpoints_conversion import Architecture, read_architecture
from oprd_megatron.config.schema import ModelConfig, RunConfig, StudentConfig
from oprd_megatron.errors import ConfigError
from oprd_megatron.parallel.layout import GridLayout, even_stages
from oprd_megatron.parallel.memory import ModelMemory, StageMemory, engine_bytes, peak_spooled
from oprd_megatron.planning.figures import (
    Batch,
    FollowStudent,
    ModelPlan,
    RankMemory,
    RunPlan,
    StageTraffic,
    Traffic,
)
from oprd_megatron.representation import grids
from oprd_megatron.representation.batch import BatchPlan, Planner
from oprd_megatron.representation.bridge import bridge_rank
from oprd_megatron.representation.layer_map import resolve_layer_pairs
from oprd_megatron.representation.route import layers_between, moved_tokens
from oprd_megatron.representation.wire import Wire, wire_name


def plan_run(config: RunConfig, world_size: int, gpus_per_node: int = 8, width: int | None = None) -> RunPlan:
    """Plan a run.

    Args:
        config: the run.
        world_size: ranks there would be.
        gpus_per_node: consecutive ranks on one machine.
        width: rank of a bridge that does not exist yet.

    Raises:
        UserError: one line: a config.json is missing, the layouts cannot work, the spool's budget is too small.
    """
    teacher, student = read_architecture(config.teacher.path), read_architecture(config.student.path)
    bridge, needs_equal = config.distill.bridge, config.distill.space == "identity"
    if teacher.hidden_size != student.hidden_size and needs_equal and width is None:
        raise ConfigError(
            f"teacher and student differ in width ({teacher.hidden_size} and {student.hidden_size}); aligning them needs "
            "a bridge: set distill.bridge, or give --bridge-rank to plan before there is one"
        )
    if width is None:
        width = bridge_rank(bridge) - config.distill.bridge_head if bridge else teacher.hidden_size
    with _quiet(grids.logger):  # it reports what follow_student saves; so does the plan
        layouts = grids.resolve_grids(config, teacher, student, world_size, width)
    pairs = resolve_layer_pairs(config.distill, student.num_layers, teacher.num_layers)
    planner = grids.planner(config, pairs, teacher, *layouts, width)
    grids.check_budget(planner, config)
    plan = planner.plan(grids.longest_samples(config))
    wire = Wire(wire_name(config.distill, config.teacher.dtype), width)
    vocab_size = max(teacher.vocab_size, student.vocab_size)
    models = [
        _model(section, architecture, layout, plan, vocab_size, config)
        for section, architecture, layout in zip(
            (config.teacher, config.student), (teacher, student), layouts, strict=True
        )
    ]
    return RunPlan(
        world_size=world_size,
        gpus_per_node=gpus_per_node,
        teacher=models[0],
        student=models[1],
        pairs=pairs,
        batch=_batch(config, plan),
        traffic=_traffic(plan, wire, gpus_per_node),
        ranks=_ranks(config, models[0], models[1], plan, wire.state_bytes, world_size),
        follow=_follow(config, planner, plan),
        held_out_engine_bytes=models[0].engine_bytes if config.eval else 0,
    )


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _model(
    section: ModelConfig,
    architecture: Architecture,
    layout: GridLayout,
    plan: BatchPlan,
    vocab_size: int,
    config: RunConfig,
) -> ModelPlan:
    sides = [chunk.student if isinstance(section, StudentConfig) else chunk.teacher for chunk in plan.chunks]
    num_micro_batches = max(side.arrangement.num_micro_batches for side in sides)
    pack_tokens = max(pack.length for side in sides for row in side.arrangement.packs for pack in row)
    memory = ModelMemory(architecture, layout, section.dtype, vocab_size, trained=False)
    if isinstance(section, StudentConfig):
        memory = ModelMemory(
            architecture, layout, section.dtype, vocab_size, True, config.optimizer.distributed, section.recompute
        )
    return ModelPlan(
        path=str(section.path),
        dtype=section.dtype,
        architecture=architecture,
        layout=layout,
        layers_per_stage=section.parallel.layers_per_stage,
        memory=memory.stages(pack_tokens, num_micro_batches),
        num_micro_batches=num_micro_batches,
        pack_tokens=pack_tokens,
        engine_bytes=engine_bytes(architecture, section.dtype),
    )


def _batch(config: RunConfig, plan: BatchPlan) -> Batch:
    sample = plan.samples[0]
    return Batch(
        num_samples=len(plan.samples),
        prompt_tokens=len(sample.prompt_ids),
        response_tokens=len(sample.response_ids),
        num_tokens=plan.num_tokens,
        num_chunks=len(plan.chunks),
        spool_bytes=None if config.distill.spool_bytes is None else int(config.distill.spool_bytes),
        spool=config.distill.spool,
    )


def _traffic(plan: BatchPlan, wire: Wire, gpus_per_node: int) -> Traffic:
    routes = [chunk.route for chunk in plan.chunks]
    links: Counter[tuple[int, int]] = Counter()
    for route in routes:
        links.update(route.bytes_by_link(wire.state_bytes))
    source, destination, teacher_stage, student_stage, states = (
        np.concatenate([getattr(route, name) for route in routes])
        for name in ("source", "destination", "teacher_stage", "student_stage", "num_states")
    )
    moved = source != destination
    near = moved & (source // gpus_per_node == destination // gpus_per_node)
    stages = []
    for (a, b), layers in routes[0].layers.items():
        here = (teacher_stage == a) & (student_stage == b)
        total, gone = int(states[here].sum()), int(states[here & moved].sum())
        stages.append(StageTraffic(a, b, layers, total, gone * wire.state_bytes, 1 - gone / total if total else 1.0))
    return Traffic(
        wire=wire.name,
        width=wire.width,
        state_bytes=wire.state_bytes,
        stages=stages,
        same_rank_bytes=int(states[~moved].sum()) * wire.state_bytes,
        same_node_bytes=int(states[near].sum()) * wire.state_bytes,
        between_nodes_bytes=int(states[moved & ~near].sum()) * wire.state_bytes,
        num_messages=int(moved.sum()),
        links=[(*pair, size) for pair, size in links.most_common()],
        most_sent=_most(source[moved], states[moved] * wire.state_bytes),
        most_received=_most(destination[moved], states[moved] * wire.state_bytes),
    )


def _most(ranks: np.ndarray, sizes: np.ndarray) -> tuple[int, int] | None:
    if len(ranks) == 0:
        return None
    totals = np.zeros(int(ranks.max()) + 1, dtype=np.int64)
    np.add.at(totals, ranks, sizes)
    return int(totals.argmax()), int(totals.max())


def _ranks(
    config: RunConfig, teacher: ModelPlan, student: ModelPlan, plan: BatchPlan, state_bytes: int, world_size: int
) -> list[RankMemory]:
    """Ranks grouped by their stages of both models, in order of their first rank."""
    held = [chunk.route.held_bytes(state_bytes) for chunk in plan.chunks]
    budget = None if config.distill.spool_bytes is None else int(config.distill.spool_bytes)
    engines = set(student.layout.spread(config.rollout.num_engines or student.layout.num_ranks))
    groups: dict[tuple[int | None, int | None], list[int]] = {}
    for rank in range(world_size):
        key = [model.layout.coords(rank).pp if rank in model.layout.ranks else None for model in (teacher, student)]
        groups.setdefault((key[0], key[1]), []).append(rank)
    rows = []
    for (a, b), ranks in groups.items():
        on_teacher = StageMemory(0, 0, 0, 0, 0) if a is None else teacher.memory[a]
        on_student = StageMemory(0, 0, 0, 0, 0) if b is None else student.memory[b]
        spooled = (
            peak_spooled([chunk.get(rank, 0) for chunk in held], budget, a is not None, b is not None) for rank in ranks
        )
        rows.append(
            RankMemory(
                teacher_stage=a,
                student_stage=b,
                first_rank=ranks[0],
                num_ranks=len(ranks),
                teacher=on_teacher.states,
                student=on_student.states,
                activations=max(on_teacher.activations, on_student.activations),
                spool=max(spooled),
                engine=student.engine_bytes if engines.intersection(ranks) else 0,
                spool_on_host=config.distill.spool == "host",
            )
        )
    return rows


def _follow(config: RunConfig, planner: Planner, plan: BatchPlan) -> FollowStudent | None:
    """None where stages make no difference: one stage, or ranks that are not shared."""
    layout = planner.teacher
    if layout.pp == 1 or layout.ranks != planner.student.ranks:
        return None
    configured = config.teacher.parallel.layers_per_stage == "follow_student"
    if configured:
        other = even_stages(layout.num_layers, len(layout.layers_per_stage))
        stages = layout.layers_per_stage
    else:
        other = layout.layers_per_stage
        stages = grids.follow_student(planner, list(plan.samples))
    moved = [moved_tokens(layout, chunk.teacher.tokens, planner.student, chunk.student.tokens) for chunk in plan.chunks]
    bytes_of = [_moved_bytes(planner, sizes, moved) for sizes in (stages, other)]
    return FollowStudent(stages, bytes_of[0], other, bytes_of[1], configured)


def _moved_bytes(planner: Planner, stages: tuple[int, ...], moved: list[np.ndarray]) -> int:
    """Bytes that would travel with these teacher stages and the plan's arrangement of the samples."""
    between = layers_between(planner.pairs, replace(planner.teacher, layers_per_stage=stages), planner.student)
    states = sum(len(layers) * int(tokens[pair]) for pair, layers in between.items() for tokens in moved)
    return states * planner.state_bytes
