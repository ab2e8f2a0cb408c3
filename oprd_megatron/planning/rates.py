"""How long a step takes, from assumed or measured rates of a cluster: what `oprd plan` and tools/simulate_schedule.py say.

What is modelled: decoding, token by token for all active sequences of an engine, with the time that weights and cache take to
be read and the arithmetic; prefill; teacher forward and student update by their FLOPs; states between the two grids and weights
to the engines by bytes over links. What is not: attention's own FLOPs (a few per cent at some thousand tokens), stragglers,
warm-up, memory limits, network contention.

`Cluster` is the machines; `Rates` adds what is to be done on them. Defaults are ASSUMED for H100s (SXM), none of them measured
by us: peak rates from the vendor's data sheet, times the share that is commonly reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import yaml
from pydantic import ByteSize, Field, PositiveFloat, PositiveInt, ValidationError

from oprd_megatron.config.base import NonNegative, Strict
from oprd_megatron.errors import ConfigError
from oprd_megatron.planning.figures import GPU_MEMORY

SCHEDULES = ("sync", "overlap", "one_step_off")


@dataclass(frozen=True)
class Decoder:
    """One engine that writes: a token of every active sequence takes
    fixed_seconds + active * sequence_seconds + cached tokens * context_seconds."""

    slots: int
    """Sequences at a time."""
    fixed_seconds: float
    sequence_seconds: float = 0.0
    context_seconds: float = 0.0

    def finish_times(self, lengths: Sequence[int], prompt_tokens: int = 0) -> np.ndarray:
        """When each of these responses (tokens) is finished, in seconds; they start in order as slots become free."""
        left = np.array(lengths, dtype=np.int64)
        finished = np.zeros(len(left))
        waiting = list(range(len(left)))
        active, waiting = waiting[: self.slots], waiting[self.slots :]
        written = np.zeros(len(left), dtype=np.int64)
        clock = 0.0
        while active:
            run = int(left[active].min())  # tokens until the next sequence ends
            count = len(active)
            context = count * prompt_tokens + int(written[active].sum())
            step = self.fixed_seconds + count * self.sequence_seconds
            clock += run * (step + context * self.context_seconds) + self.context_seconds * count * run * (run - 1) / 2
            left[active] -= run
            written[active] += run
            for index in [index for index in active if left[index] == 0]:
                finished[index] = clock
                active.remove(index)
                if waiting:
                    active.append(waiting.pop(0))
        return finished


@dataclass(frozen=True)
class Learner:
    """Teacher and student on the rest of the machines."""

    seconds_per_token: float
    """Of a response, through teacher, exchange and student, in a full batch."""
    group_seconds: NonNegative
    """Besides, for every group that is learned from at once."""
    update_seconds: NonNegative
    """Optimizer, and whatever else comes once a step."""

    def seconds(self, tokens: int) -> float:
        """To learn from a group of so many tokens."""
        return self.group_seconds + tokens * self.seconds_per_token


@dataclass(frozen=True)
class Step:
    """What a step comes to."""

    seconds: float
    rollout_idle: float
    """Share of the step in which no response is being written."""
    learner_idle: float
    """Share in which neither teacher nor student works."""
    groups: int = 1


def simulate(
    schedule: str,
    finished: np.ndarray,
    lengths: Sequence[int],
    learner: Learner,
    sync_seconds: float,
    group_tokens: int,
) -> Step:
    """One step in the steady state.

    Args:
        schedule: of `SCHEDULES`.
        finished: when each response is done, from the start of writing.
        lengths: their tokens.
        learner: teacher and student.
        sync_seconds: weights to the engines, the proof included; nobody works meanwhile.
        group_tokens: overlap: finished tokens that are enough to learn from.
    """
    written, tokens = float(finished.max()), int(sum(lengths))
    if schedule == "sync":
        learned = learner.seconds(tokens) + learner.update_seconds
        whole = written + learned + sync_seconds
        return Step(whole, 1 - written / whole, 1 - learned / whole)
    if schedule == "one_step_off":
        learned = learner.seconds(tokens) + learner.update_seconds
        whole = max(written, learned) + sync_seconds
        return Step(whole, 1 - written / whole, 1 - learned / whole)
    order = np.argsort(finished, kind="stable")
    clock, taken, worked, groups = 0.0, 0, 0.0, 0
    while taken < len(order):
        ready, have = taken, 0
        while ready < len(order) and (have < group_tokens or finished[order[ready]] <= clock):
            have += lengths[order[ready]]
            clock = max(clock, float(finished[order[ready]]))
            ready += 1
        worked += learner.seconds(have)
        clock += learner.seconds(have)
        taken, groups = ready, groups + 1
    worked, whole = worked + learner.update_seconds, clock + learner.update_seconds + sync_seconds
    return Step(whole, 1 - written / whole, 1 - worked / whole, groups)


class Cluster(Strict):
    """The machines. FLOP/s and bytes/s are of one GPU."""

    gpus_per_node: PositiveInt = 8
    """Consecutive ranks on one machine."""
    gpu_memory: Annotated[ByteSize, Field(gt=0)] = ByteSize(GPU_MEMORY)
    """Bytes of a GPU that a plan may fill."""
    teacher_flops: PositiveFloat = 445e12
    """Forward in bf16: 989 TFLOP/s x 0.45."""
    teacher_fp8_flops: PositiveFloat = 690e12
    """Forward with linear layers in fp8: 1,979 TFLOP/s x 0.35."""
    student_flops: PositiveFloat = 396e12
    """Forward and backward in bf16: x 0.40."""
    decode_flops: PositiveFloat = 396e12
    """Of an engine's arithmetic."""
    memory_bytes_per_second: PositiveFloat = 2.0e12
    """3.35 TB/s x 0.6."""
    link_bytes_per_second: PositiveFloat = 40e9
    """Between machines: 400 Gb/s a GPU x 0.8."""
    token_overhead_seconds: NonNegative = 0.004
    """Of an engine, for each token of all its sequences: scheduler, sampling, kernel launches (CUDA graphs)."""
    sync_fixed_seconds: NonNegative = 2.0
    """Weights to the engines, besides the bytes: pause, prefix cache, probe."""
    wake_seconds: NonNegative = 4.0
    """A colocated engine's sleep and wake-up."""
    group_seconds: NonNegative = 0.3
    """For every group of responses that is learned from at once: pipeline fill and planning."""
    update_seconds: NonNegative = 0.5
    """Optimizer, and whatever else comes once a step."""


class Rates(Cluster):
    """A cluster and what a step does on it."""

    student_parameters: PositiveFloat
    """That a token goes through."""
    teacher_parameters: PositiveFloat
    """The same of the teacher."""
    student_recomputes: bool
    """Another forward, for full recomputation."""
    engine_gpus: PositiveInt
    """GPUs of a rollout engine."""
    engine_slots: PositiveInt
    """Sequences that an engine writes at a time."""
    kv_bytes_per_token: NonNegative
    """Keys and values in an engine's cache."""
    exchanged_bytes_per_token: NonNegative
    """States between teacher and student, for each token of a response."""
    prompts_per_step: PositiveInt
    """Prompts."""
    responses_per_prompt: PositiveInt
    """Responses to each."""
    prompt_tokens: PositiveInt
    """Of each prompt."""
    median_length: PositiveFloat
    """Of the responses' tokens."""
    sigma_length: NonNegative
    """Standard deviation of their logarithm."""
    max_length: PositiveInt
    """Responses are cut there."""
    overlap_groups: PositiveInt = 8
    """Groups of responses that schedule overlap learns from, about."""

    def lengths(self, seed: int) -> list[int]:
        """Response lengths of a step: log-normal, cut at the longest allowed."""
        draw = np.random.default_rng(seed).standard_normal(self.prompts_per_step * self.responses_per_prompt)
        return (
            np.clip(np.rint(self.median_length * np.exp(self.sigma_length * draw)), 1, self.max_length)
            .astype(int)
            .tolist()
        )

    def written(self, lengths: Sequence[int], gpus: int) -> np.ndarray:
        """When each response is finished by the engines on so many GPUs; responses are dealt out in turn."""
        engines = gpus // self.engine_gpus
        decoder = Decoder(
            slots=self.engine_slots,
            fixed_seconds=self.token_overhead_seconds
            + 2 * self.student_parameters / (self.engine_gpus * self.memory_bytes_per_second),
            sequence_seconds=2 * self.student_parameters / (self.engine_gpus * self.decode_flops),
            context_seconds=self.kv_bytes_per_token / (self.engine_gpus * self.memory_bytes_per_second),
        )
        prefill = 2 * self.student_parameters * self.prompt_tokens / (self.engine_gpus * self.student_flops)
        finished = np.zeros(len(lengths))
        for engine in range(engines):
            mine = slice(engine, None, engines)
            if lengths[mine]:
                asked = len(lengths[mine])
                finished[mine] = asked * prefill + decoder.finish_times(lengths[mine], self.prompt_tokens)
        return finished

    def learner(self, gpus: int) -> Learner:
        """Teacher and student on so many GPUs, one after the other, with prompts spread over response tokens."""
        of_prompt = 1 + self.prompt_tokens / self.mean_length
        flops = (self.teacher_seconds + self.student_seconds) * of_prompt
        return Learner((flops + self.exchange_seconds) / gpus, self.group_seconds, self.update_seconds)

    @property
    def teacher_seconds(self) -> float:
        """Of one GPU, for each token of prompt or response: forward."""
        return 2 * self.teacher_parameters / self.teacher_flops

    @property
    def student_seconds(self) -> float:
        """The same: forward, backward, and the forward again if it recomputes."""
        return (8 if self.student_recomputes else 6) * self.student_parameters / self.student_flops

    @property
    def exchange_seconds(self) -> float:
        """Of one GPU's link, for each token of a response."""
        return self.exchanged_bytes_per_token / self.link_bytes_per_second

    @property
    def mean_length(self) -> float:
        """Of the responses, as drawn."""
        return float(np.mean(self.lengths(0)))

    @property
    def sync_seconds(self) -> float:
        """Weights in bf16 to the engines: one sender's link, in a broadcast."""
        return self.sync_fixed_seconds + 2 * self.student_parameters / self.link_bytes_per_second


C = TypeVar("C", bound=Cluster)


def read_rates(kind: type[C], path: Path) -> C:
    """A `Cluster` or `Rates` from its YAML file; keys that are left out keep their defaults. A file of `Rates` is one of a
    `Cluster` too.

    Raises:
        ConfigError: one line that names the file and the key.
    """
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    others = set(Rates.model_fields) - set(kind.model_fields)
    return _checked(kind, {key: value for key, value in values.items() if key not in others}, str(path))


def read_cluster(path: Path | None, **given: int | str | None) -> Cluster:
    """A cluster from its YAML file, or the default one; `given` goes first where it is not None.

    Raises:
        ConfigError: one line that names the file or option and the key.
    """
    cluster = Cluster() if path is None else read_rates(Cluster, path)
    changed = {key: value for key, value in given.items() if value is not None}
    return _checked(Cluster, {**cluster.model_dump(), **changed}, "--" + next(iter(changed), "").replace("_", "-"))


def _checked(kind: type[C], values: dict[str, Any], source: str) -> C:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{source}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
