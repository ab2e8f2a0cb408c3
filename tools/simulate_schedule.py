#!/usr/bin/env python
"""How long a step takes, and who waits, for each schedule of rollouts and updates, from measured or assumed rates.

    python tools/simulate_schedule.py tools/clusters/qwen72b_to_7b.yaml --nodes 4,16,64 --out runs/simulated

The file says how long responses are, what the models cost, and what the machines can do; nothing is run. The formulas are
those of `oprd plan` (oprd_megatron/planning/rates.py), which says what is modelled and what is not. Rows, for each number of
nodes and with the best division of the nodes found:

    colocated       rollouts on all GPUs, then teacher and student on all GPUs (rollout.engine: vllm)
    sync            rollouts on GPUs of their own, then teacher and student on the others
    overlap         the same, but finished responses are learned from while others are still being written
    one_step_off    the next step's responses are written during the update, by weights one version old

tools/benchmark_schedules.py holds the same functions against real steps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from oprd_megatron.entry import one_line_errors
from oprd_megatron.errors import ConfigError
from oprd_megatron.planning.rates import SCHEDULES, Rates, Step, read_rates, simulate


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
    text, records = table(read_rates(Rates, rates), counts, steps, prompts_per_node)
    typer.echo(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "schedule.md").write_text(text + "\n")
        (out / "schedule.json").write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
