"""From a config to the figures of its plan. A run's own planner plans here, so what is printed is what would travel."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from checkpoints_conversion import Architecture, read_architecture
from checkpoints_conversion.weights import hf_dir_of
from oprd_megatron.config.schema import ModelConfig, RunConfig, needs_teacher_head
from oprd_megatron.config.teachers import refuse_several
from oprd_megatron.errors import ConfigError
from oprd_megatron.parallel.layout import GridLayout, even_stages
from oprd_megatron.parallel.memory import ModelMemory, StageMemory, engine_bytes, peak_spooled
from oprd_megatron.parallel.precision import check_precisions
from oprd_megatron.planning.figures import (
    GPU_MEMORY,
    Batch,
    FollowStudent,
    ModelPlan,
    OutputTraffic,
    RankMemory,
    RunPlan,
    StageTraffic,
    Traffic,
)
from oprd_megatron.planning.output_memory import OutputMemory, OutputPlan, most_tokens
from oprd_megatron.representation import grids
from oprd_megatron.representation.batch import BatchPlan, Planner, Side
from oprd_megatron.representation.bridge import bridge_rank
from oprd_megatron.representation.layer_map import LayerPair, resolve_layer_pairs
from oprd_megatron.representation.route import Route, layers_between, moved_tokens
from oprd_megatron.representation.wire import Wire, wire_name


def plan_run(
    config: RunConfig,
    world_size: int,
    gpus_per_node: int = 8,
    width: int | None = None,
    gpu_memory: int = GPU_MEMORY,
) -> RunPlan:
    """Plan a run.

    Args:
        config: the run.
        world_size: ranks there would be.
        gpus_per_node: consecutive ranks on one machine.
        width: rank of a bridge that does not exist yet.
        gpu_memory: bytes of a GPU, of which a colocated vLLM takes a share.

    Raises:
        UserError: one line: a config.json is missing, the layouts cannot work, the spool's budget is too small.
    """
    refuse_several(config, "oprd plan")
    teacher, student = (read_architecture(hf_dir_of(m.path)) for m in (config.teacher, config.student))
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
    check_precisions(config, (teacher, student), layouts, machine=None)
    pairs = resolve_layer_pairs(config.distill, student.num_layers, teacher.num_layers)
    planner = grids.planner(config, pairs, teacher, *layouts, width)
    grids.check_budget(planner, config)
    plan = planner.plan(grids.longest_samples(config))
    wire = Wire(wire_name(config.distill, config.teacher.dtype), width)
    outputs = OutputPlan.of(config, *layouts, teacher)
    memories = _memories(config, teacher, student, layouts, pairs)
    models = [
        _model(section, memory, sides)
        for section, memory, sides in (
            (config.teacher, memories[0], [chunk.teacher for chunk in plan.chunks]),
            (config.student, memories[1], [chunk.student for chunk in plan.chunks]),
        )
    ]
    tokens = most_tokens(plan, "teacher"), most_tokens(plan, "student")
    of_terms = OutputMemory(config.output, outputs, *memories, tokens)
    return RunPlan(
        world_size=world_size,
        gpus_per_node=gpus_per_node,
        teacher=models[0],
        student=models[1],
        pairs=pairs,
        batch=_batch(config, plan),
        traffic=_traffic(plan, wire, outputs, gpus_per_node),
        ranks=_ranks(config, models[0], models[1], plan, planner, of_terms, world_size, gpu_memory),
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


def _memories(
    config: RunConfig,
    teacher: Architecture,
    student: Architecture,
    layouts: tuple[GridLayout, GridLayout],
    pairs: Sequence[LayerPair],
) -> tuple[ModelMemory, ModelMemory]:
    vocab_size = max(teacher.vocab_size, student.vocab_size)
    maps = {pair.student_layer: teacher.hidden_size * student.hidden_size for pair in pairs}
    return (
        ModelMemory(
            teacher,
            layouts[0],
            config.teacher.dtype,
            vocab_size,
            trained=False,
            precision=config.teacher.precision,
            has_head=needs_teacher_head(config),
        ),
        ModelMemory(
            student,
            layouts[1],
            config.student.dtype,
            vocab_size,
            trained=True,
            distributed=config.optimizer.distributed,
            recompute=config.student.recompute,
            trains_head=bool(config.output.terms),
            state_maps=maps if config.distill.space == "linear" else {},
        ),
    )


def _model(section: ModelConfig, memory: ModelMemory, sides: Sequence[Side]) -> ModelPlan:
    num_micro_batches = max(side.arrangement.num_micro_batches for side in sides)
    pack_tokens = max(pack.length for side in sides for row in side.arrangement.packs for pack in row)
    return ModelPlan(
        path=str(section.path),
        dtype=section.dtype,
        linear=section.precision.linear,
        has_head=memory.has_head,
        architecture=memory.architecture,
        layout=memory.layout,
        layers_per_stage=section.parallel.layers_per_stage,
        memory=memory.stages(pack_tokens, num_micro_batches),
        num_micro_batches=num_micro_batches,
        pack_tokens=pack_tokens,
        engine_bytes=engine_bytes(memory.architecture, section.dtype),
    )


def _batch(config: RunConfig, plan: BatchPlan) -> Batch:
    sample = plan.samples[0]
    return Batch(
        num_samples=len(plan.samples),
        prompt_tokens=len(sample.prompt_ids),
        response_tokens=len(sample.response_ids),
        num_tokens=plan.num_tokens,
        predicted_tokens=sum(len(chunk.outputs.targets) for chunk in plan.chunks if chunk.outputs),
        num_chunks=len(plan.chunks),
        spool_bytes=None if config.distill.spool_bytes is None else int(config.distill.spool_bytes),
        spool=config.distill.spool,
    )


def _traffic(plan: BatchPlan, wire: Wire, outputs: OutputPlan | None, gpus_per_node: int) -> Traffic:
    routes = [chunk.route for chunk in plan.chunks]
    freight, of_terms = [(route, wire.state_bytes) for route in routes], None
    if outputs is not None:
        of_outputs = [chunk.outputs.route for chunk in plan.chunks if chunk.outputs and chunk.outputs.route]
        of_terms = _output_traffic(of_outputs, outputs)
        freight += [(route, outputs.wire.state_bytes) for route in of_outputs]
    links: Counter[tuple[int, int]] = Counter()
    for route, size in freight:
        links.update(route.bytes_by_link(size))
    everything = [route for route, _ in freight]
    source, destination = _joined(everything, "source"), _joined(everything, "destination")
    sizes = np.concatenate([route.num_states * size for route, size in freight])
    moved = source != destination
    near = moved & (source // gpus_per_node == destination // gpus_per_node)
    return Traffic(
        wire=wire.name,
        width=wire.width,
        state_bytes=wire.state_bytes,
        stages=_by_stages(routes, wire.state_bytes),
        outputs=of_terms,
        same_rank_bytes=int(sizes[~moved].sum()),
        same_node_bytes=int(sizes[near].sum()),
        between_nodes_bytes=int(sizes[moved & ~near].sum()),
        num_messages=int(moved.sum()),
        links=[(*pair, size) for pair, size in links.most_common()],
        most_sent=_most(source[moved], sizes[moved]),
        most_received=_most(destination[moved], sizes[moved]),
    )


def _output_traffic(routes: Sequence[Route], outputs: OutputPlan) -> OutputTraffic:
    wire = outputs.wire
    (row,) = _by_stages(routes, wire.state_bytes)
    return OutputTraffic(
        head=outputs.head,
        wire=wire.name,
        width=wire.width,
        token_bytes=wire.state_bytes,
        teacher_stage=row.teacher_stage,
        student_stage=row.student_stage,
        tokens=row.states,
        moved_bytes=row.moved_bytes,
        stays=row.stays,
    )


def _by_stages(routes: Sequence[Route], state_bytes: int) -> list[StageTraffic]:
    """What the routes of all chunks carry between each pair of stages."""
    teacher_stage, student_stage = _joined(routes, "teacher_stage"), _joined(routes, "student_stage")
    states, moved = _joined(routes, "num_states"), _joined(routes, "source") != _joined(routes, "destination")
    rows = []
    for (a, b), layers in routes[0].layers.items():
        here = (teacher_stage == a) & (student_stage == b)
        total, gone = int(states[here].sum()), int(states[here & moved].sum())
        rows.append(StageTraffic(a, b, layers, total, gone * state_bytes, 1 - gone / total if total else 1.0))
    return rows


def _joined(routes: Sequence[Route], name: str) -> np.ndarray:
    return np.concatenate([getattr(route, name) for route in routes])


def _most(ranks: np.ndarray, sizes: np.ndarray) -> tuple[int, int] | None:
    if len(ranks) == 0:
        return None
    totals = np.zeros(int(ranks.max()) + 1, dtype=np.int64)
    np.add.at(totals, ranks, sizes)
    return int(totals.argmax()), int(totals.max())


def _ranks(
    config: RunConfig,
    teacher: ModelPlan,
    student: ModelPlan,
    plan: BatchPlan,
    planner: Planner,
    outputs: OutputMemory,
    world_size: int,
    gpu_memory: int,
) -> list[RankMemory]:
    """Ranks grouped by their stages of both models, in order of their first rank."""
    vllm = config.rollout.vllm if config.rollout.engine == "vllm" else None
    held = [chunk.held_bytes(planner.state_bytes, planner.output_bytes) for chunk in plan.chunks]
    budget = None if config.distill.spool_bytes is None else int(config.distill.spool_bytes)
    engines = set(student.layout.spread(config.rollout.num_engines or student.layout.num_ranks))
    if config.rollout.engine != "hf":
        engines = set()
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
                outputs=max(outputs.of_rank(rank) for rank in ranks),
                engine=student.engine_bytes if engines.intersection(ranks) else 0,
                vllm=round(vllm.gpu_memory_utilization * gpu_memory) if vllm else 0,
                vllm_on_host=student.engine_bytes // vllm.tp if vllm else 0,
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
    bytes_of = [_moved_bytes(planner, sizes, moved, plan) for sizes in (stages, other)]
    return FollowStudent(stages, bytes_of[0], other, bytes_of[1], configured)


def _moved_bytes(planner: Planner, stages: tuple[int, ...], moved: list[np.ndarray], plan: BatchPlan) -> int:
    """Bytes that would travel with these teacher stages and the plan's arrangement of the samples; outputs as they do."""
    between = layers_between(planner.pairs, replace(planner.teacher, layers_per_stage=stages), planner.student)
    states = sum(len(layers) * int(tokens[pair]) for pair, layers in between.items() for tokens in moved)
    return states * planner.state_bytes + sum(chunk.total_bytes(0, planner.output_bytes) for chunk in plan.chunks)
