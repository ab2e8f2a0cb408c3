"""About how long a planned step takes, phase by phase, from a cluster's assumed or measured rates (rates.py).

Two batches are timed: `typical`, whose responses' lengths are log-normal with a median of a quarter of the longest allowed,
and `longest`, all of which are as long as the config allows (what traffic and memory are planned for).

    rollout     when the last response is written, by as many engines as there are
    teacher     2 N_T FLOPs a token of prompt and response
    exchange    the plan's bytes over links between machines
    student     6 N_S FLOPs a token, 8 with full recomputation; longer by the pipeline's bubble
    update      gradients and weights over the data-parallel ranks' links, the optimizer
    sync        weights to the engines; a colocated engine's sleep and wake-up

N counts the numbers that a token goes through: of a mixture's experts those that it is sent to; an embedding none, a head only
if output terms look at it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from checkpoints_conversion import Architecture, mappings_for
from oprd_megatron.config.schema import RunConfig
from oprd_megatron.parallel.memory import DTYPE_BYTES, EMBEDDING, HEAD
from oprd_megatron.planning.figures import ModelPlan, RunPlan
from oprd_megatron.planning.rates import Cluster, Learner, Rates, simulate

TYPICAL_MEDIAN, TYPICAL_SIGMA = 0.25, 0.8
VLLM_SLOTS = 256
"""Sequences that vLLM writes at a time, where `rollout.vllm.args` does not say."""
OUTSIDE = ("vllm_server",)
"""Engines whose GPUs are not the ranks'."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step's phases.

    Attributes:
        median_tokens: of its responses; None if all have the same length.
        tokens: of all its responses.
        rollout, teacher, exchange, student, update, sync: as above.
        whole: of the step; less than their sum where phases overlap.
    """

    median_tokens: int | None
    tokens: int
    rollout: float
    teacher: float
    exchange: float
    student: float
    update: float
    sync: float
    whole: float


@dataclass(frozen=True)
class StepTimes:
    """Of a planned run.

    Attributes:
        typical, longest: batches.
        engines: rollout engines, of `engine_gpus` GPUs and `engine_slots` sequences each; none if text is recorded.
        learners_overlap: teacher and student have ranks of their own and work at the same time.
        cluster: the rates.
    """

    typical: StepTime
    longest: StepTime
    engines: int
    engine_gpus: int
    engine_slots: int
    learners_overlap: bool
    cluster: Cluster = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {**asdict(replace(self, cluster=Cluster())), "cluster": self.cluster.model_dump()}


def step_times(config: RunConfig, plan: RunPlan, cluster: Cluster) -> StepTimes:
    """Time a planned run."""
    engines, rates = _engines(config, plan), _rates(config, plan, cluster)
    longest = rates.model_copy(update={"median_length": float(rates.max_length), "sigma_length": 0.0})
    return StepTimes(
        typical=_step(config, plan, rates, engines),
        longest=_step(config, plan, longest, engines),
        engines=engines,
        engine_gpus=rates.engine_gpus,
        engine_slots=rates.engine_slots,
        learners_overlap=not plan.shares_ranks,
        cluster=cluster,
    )


def active_parameters(architecture: Architecture, with_head: bool) -> int:
    """Numbers of a model that a token is multiplied with."""
    share = 1.0
    if (experts := architecture.experts) is not None:
        share = experts.top_k / experts.num_experts
    total = 0.0
    for name, mapping in mappings_for(architecture).items():
        if name == EMBEDDING or (name == HEAD and not with_head):
            continue
        count = sum(math.prod(shape) for shape in mapping.hf_shapes.values())
        total += count * (share if ".experts." in name else 1)
    return round(total)


def _rates(config: RunConfig, plan: RunPlan, cluster: Cluster) -> Rates:
    student, batch, terms = plan.student, plan.batch, bool(config.output.terms)
    fp8 = config.teacher.precision.linear == "fp8"
    longest_tokens = batch.num_samples * batch.response_tokens
    teacher_flops = cluster.teacher_fp8_flops if fp8 else cluster.teacher_flops
    architecture = student.architecture
    kv = 2 * architecture.num_layers * architecture.num_query_groups * architecture.head_dim
    kv_bytes = kv * DTYPE_BYTES[student.dtype]
    median = TYPICAL_MEDIAN * batch.response_tokens
    return Rates(
        **{**cluster.model_dump(), "teacher_flops": teacher_flops},
        student_parameters=active_parameters(architecture, terms),
        teacher_parameters=active_parameters(plan.teacher.architecture, terms),
        student_recomputes=config.student.recompute.granularity == "full",
        engine_gpus=_engine_gpus(config),
        engine_slots=_slots(config, plan, cluster, kv_bytes, batch.prompt_tokens + median),
        kv_bytes_per_token=kv_bytes,
        exchanged_bytes_per_token=plan.traffic.total_bytes / longest_tokens,
        prompts_per_step=config.rollout.prompts_per_step,
        responses_per_prompt=config.rollout.responses_per_prompt,
        prompt_tokens=batch.prompt_tokens,
        median_length=median,
        sigma_length=TYPICAL_SIGMA,
        max_length=batch.response_tokens,
    )


def _engine_gpus(config: RunConfig) -> int:
    return config.rollout.vllm.tp if config.rollout.engine.startswith("vllm") else 1


def _engines(config: RunConfig, plan: RunPlan) -> int:
    section = config.rollout
    if section.engine == "file":
        return 0
    if section.engine in OUTSIDE:
        return len(section.server.urls) or section.server.start
    if section.engine == "vllm":
        return plan.world_size // section.vllm.tp
    return min(section.num_engines or plan.student.layout.num_ranks, plan.student.layout.num_ranks)


def _slots(config: RunConfig, plan: RunPlan, cluster: Cluster, kv_bytes: int, context: float) -> int:
    """Sequences that fit into an engine's cache, at most as many as it takes."""
    section = config.rollout
    if not section.engine.startswith("vllm"):
        return section.batch_size
    room = section.vllm.gpu_memory_utilization * cluster.gpu_memory * section.vllm.tp - plan.student.engine_bytes
    most = int(section.vllm.args.get("max_num_seqs", VLLM_SLOTS))
    return max(1, min(most, int(room / (kv_bytes * context))))


def _step(config: RunConfig, plan: RunPlan, rates: Rates, engines: int) -> StepTime:
    lengths = rates.lengths(0)
    tokens, all_tokens = sum(lengths), sum(lengths) + len(lengths) * rates.prompt_tokens
    teacher = all_tokens * rates.teacher_seconds * _bubble(plan.teacher) / plan.teacher.layout.num_ranks
    student = all_tokens * rates.student_seconds * _bubble(plan.student) / plan.student.layout.num_ranks
    exchange = tokens * rates.exchange_seconds / plan.student.layout.num_ranks
    update = rates.update_seconds + _reduction(plan.student) / rates.link_bytes_per_second
    written = rates.written(lengths, engines * rates.engine_gpus) if engines else None
    rollout = 0.0 if written is None else float(written.max())
    sync = rates.sync_seconds + (rates.wake_seconds if config.rollout.engine == "vllm" else 0.0) if engines else 0.0
    learned = exchange + (teacher + student if plan.shares_ranks else max(teacher, student))
    whole = rollout + learned + update + sync
    if written is not None and config.rollout.schedule != "sync":
        learner = Learner(learned / tokens, rates.group_seconds, update)
        group = max(1, tokens // rates.overlap_groups)
        whole = simulate(config.rollout.schedule, written, lengths, learner, sync, group).seconds
    median = int(rates.median_length) if rates.sigma_length else None
    return StepTime(median, tokens, rollout, teacher, exchange, student, update, sync, whole)


def _bubble(model: ModelPlan) -> float:
    """How much longer a pipeline takes for its filling and draining."""
    layout = model.layout
    return 1 + (layout.pp - 1) / (layout.vpp * model.num_micro_batches)


def _reduction(model: ModelPlan) -> int:
    """Bytes that a rank sends after backward: gradients, and weights back where the optimizer is sharded; both about once."""
    if model.layout.dp * model.layout.cp == 1:
        return 0
    return max(stage.gradients + stage.weights for stage in model.memory)
