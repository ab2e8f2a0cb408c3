"""Does a planned run fit into its GPUs? If not, by how much it does not, and what would help.

A way out is one setting or two (`key=value`), planned again: those that then fit come first, and of those the ones that change
least. Which settings are tried follows from the figures: what takes nothing is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

from oprd_megatron.config import parse_config
from oprd_megatron.config.load import with_overrides
from oprd_megatron.config.schema import ParallelConfig, RunConfig
from oprd_megatron.errors import LayoutError, UserError
from oprd_megatron.planning.collect import plan_run
from oprd_megatron.planning.figures import RankMemory, RunPlan
from oprd_megatron.planning.text import size

NUM_WAYS = 3
Settings = tuple[str, ...]
"""key=value, as on the command line."""


@dataclass(frozen=True)
class WayOut:
    """Settings, and what the fullest rank then holds."""

    settings: Settings
    device_bytes: int


def check_room(config: RunConfig, plan: RunPlan, gpu_memory: int, width: int | None = None) -> None:
    """Refuse a plan of which a rank does not fit into its GPU.

    Args:
        config: of the plan.
        plan: from `plan_run`.
        gpu_memory: bytes of a GPU.
        width: as given to `plan_run`.

    Raises:
        LayoutError: one line with the rank, what it needs, what is missing, and ways out.
    """
    rank = plan.fullest
    if rank.device_bytes <= gpu_memory:
        return
    missing = size(rank.device_bytes - gpu_memory)
    text = (
        f"rank {rank.first_rank} needs {size(rank.device_bytes)} ({_parts(rank)}) of its GPU's {size(gpu_memory)}: {missing} "
        "too much"
    )
    ways = ways_out(config, plan, gpu_memory, width)
    shown = "; ".join(
        f"{' '.join(way.settings)} ({size(way.device_bytes)}{'' if way.device_bytes <= gpu_memory else ', still too much'})"
        for way in ways
    )
    raise LayoutError(f"{text}; ways out: {shown or 'more GPUs for each model'}")


def check_device(config: RunConfig, world_size: int, gpu_memory: int, gpus_per_node: int) -> None:
    """`check_room` of a run that is about to start on GPUs of this size. (Of several teachers no plan says all.)

    Raises:
        LayoutError: a rank does not fit.
    """
    if not config.teachers:
        check_room(config, plan_run(config, world_size, gpus_per_node, gpu_memory=gpu_memory), gpu_memory)


def ways_out(config: RunConfig, plan: RunPlan, gpu_memory: int, width: int | None) -> list[WayOut]:
    """The first three that fit, one setting before two of those that help; filled up with those that help most."""
    found: list[WayOut] = []

    def try_all(choices: Iterable[Settings]) -> None:
        for settings in choices:
            if sum(way.device_bytes <= gpu_memory for way in found) == NUM_WAYS:
                return
            needed = _needed(config, plan, settings, gpu_memory, width)
            if needed is not None and needed < plan.fullest.device_bytes:
                found.append(WayOut(settings, needed))

    try_all(candidates(config, plan, gpu_memory))
    pairs = combinations([way.settings for way in found], 2)
    try_all(one + other for one, other in pairs if not _keys(one) & _keys(other))
    return sorted(found, key=lambda way: max(way.device_bytes, gpu_memory))[:NUM_WAYS]


def candidates(config: RunConfig, plan: RunPlan, gpu_memory: int) -> Iterator[Settings]:
    """Settings that may help the fullest rank, those that cost least first."""
    rank, student, teacher = plan.fullest, plan.student.layout, plan.teacher.layout
    if rank.writing_bytes > gpu_memory and rank.vllm:
        tp = config.rollout.vllm.tp
        share = int(100 * (gpu_memory - rank.writing_bytes + rank.vllm) / gpu_memory) / 100
        if share * gpu_memory > plan.student.engine_bytes / tp:
            yield (f"rollout.vllm.gpu_memory_utilization={share:g}",)
        elif share * gpu_memory > plan.student.engine_bytes / (2 * tp):
            yield (f"rollout.vllm.gpu_memory_utilization={share:g}", f"rollout.vllm.tp={2 * tp}")
    if rank.student and not config.optimizer.distributed and student.dp * student.cp > 1:
        yield ("optimizer.distributed=true",)
    if rank.activations and config.student.recompute.granularity != "full":
        yield ("student.recompute.granularity=full",)
    if rank.spool and not rank.spool_on_host:
        yield ("distill.spool=host",)
        yield (f"distill.spool_bytes={max(1, rank.spool // 4 // 2**20)}MiB",)
    if rank.teacher and not config.teacher.precision.is_quantised and config.teacher.ema_decay is None:
        yield (f"teacher.precision.linear={'fp8' if config.teacher.dtype == 'bf16' else 'weight_only'}",)
    if rank.activations and config.run.micro_batch_size > 1 and config.run.micro_batch_tokens is None:
        yield (f"run.micro_batch_size={config.run.micro_batch_size // 2}",)
    longest = plan.batch.prompt_tokens + plan.batch.response_tokens
    if rank.activations and config.run.micro_batch_tokens is not None and config.run.micro_batch_tokens > longest:
        yield (f"run.micro_batch_tokens={max(longest, config.run.micro_batch_tokens // 2)}",)
    if rank.outputs and config.output.chunk_tokens > 1:
        yield (f"output.chunk_tokens={config.output.chunk_tokens // 2}",)
    if config.teacher.ema_decay is not None:
        return  # both models need one layout
    for name, grid, parallel in (
        ("student", student, config.student.parallel), ("teacher", teacher, config.teacher.parallel)
    ):  # fmt: skip
        if grid.dp > 1 and grid.dp % 2 == 0:
            rest = [f"{name}.parallel.dp={grid.dp // 2}"] if parallel.dp else []
            sp = [f"{name}.parallel.sp=true"] if name == "student" and not parallel.sp else []
            if grid.tp < plan.gpus_per_node:
                yield (f"{name}.parallel.tp={2 * grid.tp}", *sp, *rest)
            if _free_stages(parallel):
                yield (f"{name}.parallel.pp={2 * grid.pp}", *rest)
    if rank.activations and student.cp * student.tp < plan.gpus_per_node and student.dp % 2 == 0:
        rest = [f"student.parallel.dp={student.dp // 2}"] if config.student.parallel.dp else []
        yield (f"student.parallel.cp={2 * student.cp}", *rest)


def _free_stages(parallel: ParallelConfig) -> bool:
    named = parallel.layers_per_stage, parallel.first_stage_layers, parallel.last_stage_layers
    return not any(isinstance(stages, (list, int)) for stages in named)


def _keys(settings: Settings) -> set[str]:
    return {setting.split("=")[0] for setting in settings}


def _needed(config: RunConfig, plan: RunPlan, settings: Settings, gpu_memory: int, width: int | None) -> int | None:
    """Bytes that the fullest rank holds with these settings; None if they cannot work."""
    try:
        changed = parse_config(with_overrides(config.model_dump(mode="json"), settings), "a way out")
        planned = plan_run(changed, plan.world_size, plan.gpus_per_node, width, gpu_memory)
    except UserError:
        return None
    return planned.fullest.device_bytes


def _parts(rank: RankMemory) -> str:
    """What it holds at its fullest, the largest first."""
    parts = {"teacher": rank.teacher, "student": rank.student, "engine": rank.engine}
    if rank.learning_bytes >= rank.writing_bytes:
        spool = 0 if rank.spool_on_host else rank.spool
        parts |= {"activations": rank.activations, "spool": spool, "outputs": rank.outputs}
    else:
        parts["vLLM"] = rank.vllm
    return ", ".join(f"{name} {size(number)}" for name, number in sorted(parts.items(), key=lambda p: -p[1]) if number)
