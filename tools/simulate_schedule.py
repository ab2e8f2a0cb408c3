#!/usr/bin/env python
"""How long a step takes, and who waits, for each schedule of rollouts and updates, from measured or assumed rates.

    python tools/simulate_schedule.py tools/clusters/qwen72b_to_7b.yaml --nodes 4,16,64 --out runs/simulated

The file says how long responses are, what the models cost, and what the machines can do; `oprd_megatron` itself is not run.
Rows, for each number of nodes and with the best division of the nodes found:

    colocated       rollouts on all GPUs, then teacher and student on all GPUs (rollout.engine: vllm)
    sync            rollouts on GPUs of their own, then teacher and student on the others
    overlap         the same, but finished responses are learned from while others are still being written
    one_step_off    the next step's responses are written during the update, by weights one version old

What is modelled: decoding, token by token for all active sequences of an engine, with the time that weights and cache take to
be read and the arithmetic; prefill; teacher forward and student update by their FLOPs; states between the two grids and weights
to the engines by bytes over links. What is not: stragglers, warm-up, memory limits, network contention.
tools/benchmark_schedules.py holds the same functions against real steps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from pydantic import PositiveFloat, PositiveInt, ValidationError

from oprd_megatron.config.base import NonNegative, Strict
from oprd_megatron.entry import one_line_errors
from oprd_megatron.errors import ConfigError

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


class Rates(Strict):
    """Assumed or measured rates of a cluster, from its YAML file. FLOP/s and bytes/s are of one GPU."""

    gpus_per_node: PositiveInt
    student_parameters: PositiveFloat
    teacher_parameters: PositiveFloat
    teacher_flops: PositiveFloat
    student_flops: PositiveFloat
    student_recomputes: bool
    decode_flops: PositiveFloat
    memory_bytes_per_second: PositiveFloat
    link_bytes_per_second: PositiveFloat
    engine_gpus: PositiveInt
    engine_slots: PositiveInt
    token_overhead_seconds: NonNegative
    sync_fixed_seconds: NonNegative
    wake_seconds: NonNegative
    kv_bytes_per_token: NonNegative
    exchanged_bytes_per_token: NonNegative
    group_seconds: NonNegative
    update_seconds: NonNegative
    prompts_per_step: PositiveInt
    responses_per_prompt: PositiveInt
    prompt_tokens: int
    median_length: PositiveFloat
    sigma_length: NonNegative
    max_length: PositiveInt
    overlap_groups: PositiveInt = 8

    @classmethod
    def read(cls, path: Path) -> Rates:
        """From a YAML file."""
        try:
            return cls.model_validate(yaml.safe_load(path.read_text()))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None

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
        flops = 2 * self.teacher_parameters / self.teacher_flops
        flops += (8 if self.student_recomputes else 6) * self.student_parameters / self.student_flops
        of_prompt = 1 + self.prompt_tokens / self.mean_length
        exchange = self.exchanged_bytes_per_token / self.link_bytes_per_second
        return Learner((flops * of_prompt + exchange) / gpus, self.group_seconds, self.update_seconds)

    @property
    def mean_length(self) -> float:
        """Of the responses, as drawn."""
        return float(np.mean(self.lengths(0)))

    @property
    def sync_seconds(self) -> float:
        """Weights in bf16 to the engines: one sender's link, in a broadcast."""
        return self.sync_fixed_seconds + 2 * self.student_parameters / self.link_bytes_per_second


def best_division(rates: Rates, schedule: str, nodes: int, steps: int) -> tuple[int, Step]:
    """The number of GPUs for rollouts that makes a step shortest, and the mean step. The rest learns."""
    total, best = nodes * rates.gpus_per_node, None
    sizes = sorted(
        {
            max(rates.engine_gpus, round(total * part / 16 / rates.engine_gpus) * rates.engine_gpus)
            for part in range(1, 16)
        }
    )
    for gpus in [size for size in sizes if size < total]:
        found = mean_step([of_step(rates, schedule, gpus, total - gpus, seed) for seed in range(steps)])
        if best is None or found.seconds < best[1].seconds:
            best = gpus, found
    if best is None:
        raise ConfigError(f"{nodes} nodes: no GPU is left to learn; give more nodes")
    return best


def of_step(rates: Rates, schedule: str, writing: int, learning: int, seed: int) -> Step:
    """One step of a schedule on a division of the GPUs."""
    lengths = rates.lengths(seed)
    group = max(1, rates.prompts_per_step * rates.responses_per_prompt * rates.max_length // rates.overlap_groups)
    group = min(group, max(1, sum(lengths) // rates.overlap_groups))
    return simulate(
        schedule, rates.written(lengths, writing), lengths, rates.learner(learning), rates.sync_seconds, group
    )


def colocated(rates: Rates, nodes: int, steps: int) -> Step:
    """Rollouts on all GPUs, then learning on all of them."""
    gpus, found = nodes * rates.gpus_per_node, []
    awake = rates.model_copy(update={"sync_fixed_seconds": rates.sync_fixed_seconds + rates.wake_seconds})
    for seed in range(steps):
        step = of_step(awake, "sync", gpus, gpus, seed)
        found.append(replace(step, rollout_idle=0.0, learner_idle=0.0))
    return mean_step(found)


def mean_step(steps: Sequence[Step]) -> Step:
    """The mean of several."""
    seconds, rollout, learner, groups = np.mean(
        [(s.seconds, s.rollout_idle, s.learner_idle, s.groups) for s in steps], axis=0
    )
    return Step(float(seconds), float(rollout), float(learner), round(groups))


def table(
    rates: Rates, nodes: Sequence[int], steps: int, prompts_per_node: int | None = None
) -> tuple[str, list[dict[str, Any]]]:
    """The rows as text and as records."""
    lines = [
        "| nodes | schedule | GPUs: write + learn | step (s) | steps an hour | against sync | writers idle | learners idle |",
        "|---|---|---|---|---|---|---|---|",
    ]
    records = []
    for count in nodes:
        if prompts_per_node is not None:
            rates = rates.model_copy(update={"prompts_per_step": prompts_per_node * count})
        whole = count * rates.gpus_per_node
        rows: list[tuple[str, str, Step]] = [("colocated", f"{whole} in turn", colocated(rates, count, steps))]
        for schedule in SCHEDULES:
            gpus, step = best_division(rates, schedule, count, steps)
            rows.append((schedule, f"{gpus} + {whole - gpus}", step))
        sync = next(step for name, _, step in rows if name == "sync")
        for name, gpus_text, step in rows:
            idle = ("", "") if name == "colocated" else (f"{step.rollout_idle:.0%}", f"{step.learner_idle:.0%}")
            lines.append(
                f"| {count} | {name} | {gpus_text} | {step.seconds:.1f} | {3600 / step.seconds:.1f} | "
                f"{sync.seconds / step.seconds:.2f} | {idle[0]} | {idle[1]} |"
            )
            records.append({"nodes": count, "schedule": name, "gpus": gpus_text, **step.__dict__})
    return "\n".join(lines), records


def main(
    rates: Annotated[Path, typer.Argument(help="YAML file of rates.", show_default=False)],
    nodes: Annotated[str, typer.Option(help="Numbers of nodes, with commas.")] = "4,16,64",
    steps: Annotated[int, typer.Option(min=1, help="Steps to average over, each with lengths of its own.")] = 3,
    prompts_per_node: Annotated[
        int | None,
        typer.Option(min=1, help="Let the batch grow with the nodes; left out, prompts_per_step of the file."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for schedule.md and schedule.json; made.")] = None,
) -> None:
    """Step time and idle time of each schedule for given numbers of nodes."""
    try:
        counts = [int(part) for part in nodes.split(",")]
    except ValueError:
        raise ConfigError(f"--nodes {nodes}: give whole numbers with commas, for example 4,16") from None
    text, records = table(Rates.read(rates), counts, steps, prompts_per_node)
    typer.echo(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "schedule.md").write_text(text + "\n")
        (out / "schedule.json").write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
