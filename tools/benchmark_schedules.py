#!/usr/bin/env python
"""Steps an hour of the three schedules, with a real teacher and student and a rollout server of recorded speed.

    python tools/benchmark_schedules.py examples/quickstart.yaml --out runs/schedules

The server is a stand-in that takes no CPU (`tools/slow_engine.py`): random text, log-normal lengths, a fixed time a token. That
time is set so that the teacher takes --teacher-share of the time that rollouts take, as measured in a few steps before.
Everything else is what a run does: teacher forward, exchange, student forward and backward, optimizer, weights taken from the
shards. Schedules take turns, round after round, on the same texts; the table shows medians, ratios of the same round, and what
tools/simulate_schedule.py's functions say for the rates that the sync steps showed.
"""

from __future__ import annotations

import contextlib
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import torch.distributed as dist
import typer
from slow_engine import RandomText, SlowEngine
from tqdm import tqdm

from oprd_megatron.config import RunConfig, load_config
from oprd_megatron.entry import one_line_errors, quiet_libraries
from oprd_megatron.errors import ConfigError
from oprd_megatron.placing import build_all
from oprd_megatron.planning.rates import SCHEDULES, Decoder, Learner, simulate
from oprd_megatron.platform import init_distributed, select_platform
from oprd_megatron.preflight import preflight
from oprd_megatron.rollout import make_requests
from oprd_megatron.rollout.weight_sync import sync_weights
from oprd_megatron.trainer import Trainer


def main(
    config: Annotated[
        Path, typer.Argument(help="YAML file of a run; its eval section is left out.", show_default=False)
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value", show_default=False)] = None,
    teacher_share: Annotated[float, typer.Option(help="Teacher's time over rollouts' time.")] = 0.3,
    rounds: Annotated[int, typer.Option(min=1, help="Of three steps with each schedule.")] = 3,
    sigma: Annotated[float, typer.Option(help="Standard deviation of the logarithm of lengths.")] = 0.8,
    median: Annotated[float, typer.Option(help="Median length over the longest allowed.")] = 0.25,
    out: Annotated[Path | None, typer.Option(help="Folder for schedules.md and schedules.png; made.")] = None,
) -> None:
    """Measure and predict steps an hour of sync, overlap and one_step_off."""
    run = load_config(
        config,
        [
            *(overrides or []),
            "rollout.engine=vllm_server",
            "rollout.buffer=false",
            "eval=null",
            "logging.progress=false",
        ],
    )
    init_distributed(select_platform(run.run.device))
    if dist.get_world_size() != 1:
        raise ConfigError("one process: start it with python, not torchrun")
    bench = Bench(run, median, sigma)
    bench.calibrate(teacher_share)
    found: dict[str, list[dict[str, Any]]] = {schedule: [] for schedule in SCHEDULES}
    for number in tqdm(range(rounds), desc="rounds"):
        for schedule in SCHEDULES:
            found[schedule].append(bench.round(schedule, number))
    text = report(bench, found)
    typer.echo(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "schedules.md").write_text(text + "\n")
        draw(found, out / "schedules.png")
    dist.destroy_process_group()


class Bench:
    """A trainer whose schedule can be changed between steps."""

    def __init__(self, config: RunConfig, median: float, sigma: float) -> None:
        platform = select_platform(config.run.device)
        checked = preflight(config, 1, starts_run=False)
        teachers, student = build_all(checked, platform)
        text = RandomText(checked.student_vocab_size, median * config.rollout.max_response_tokens, sigma)
        self.engine = SlowEngine(text, 0.0)
        self.trainer = Trainer(checked, teachers, student, platform, lambda: self.engine)
        self.config = config
        # Without the probe, which random text has no scores for; weights are still gathered and taken.
        self.trainer.sync = self.sync  # type: ignore[method-assign]
        self.sync(0)
        self.trainer.last_step = 10**9

    def sync(self, version: int, phase: Any = None) -> None:
        """The trainer's, without its probe."""
        with phase("rollout") if phase else contextlib.nullcontext():
            self.trainer.text.settle()
        sync_weights(self.engine, self.trainer.student, version)
        self.trainer.weight_version = version

    def calibrate(self, teacher_share: float) -> None:
        """Set the engine's speed by steps in which it takes no time: the second and third."""
        records = [self.step("sync", number) for number in range(3)][1:]
        teacher = statistics.mean(record["seconds"]["teacher"] for record in records)
        longest = statistics.mean(record["response_length"]["max"] for record in records)
        self.engine.seconds_per_token = teacher / teacher_share / longest

    def step(self, schedule: str, number: int) -> dict[str, Any]:
        """One step with a schedule."""
        section = self.config.rollout.model_copy(update={"schedule": schedule})
        self.trainer.config = self.config.model_copy(update={"rollout": section})
        self.trainer.text.section = section
        self.trainer.curator = replace(self.trainer.curator, section=section)
        return self.trainer.step(number)

    def round(self, schedule: str, number: int) -> dict[str, Any]:
        """Three steps on the same texts with any schedule, the last in the steady state: its record, and its time."""
        first = 3 * number + 3
        # A step is written ahead, and thrown away: the last of a round is like others.
        self.trainer.last_step = first + 3
        records = [self.step(schedule, first + offset) for offset in range(3)]
        self.trainer.text.settle()
        self.trainer.text._ahead = None
        last = records[-1]
        return {**last, "step_seconds": last["response_length"]["mean"] * self.samples / last["tokens_per_second"]}

    @property
    def samples(self) -> int:
        """Responses of a step."""
        return self.config.rollout.prompts_per_step * self.config.rollout.responses_per_prompt


def report(bench: Bench, found: dict[str, list[dict[str, Any]]]) -> str:
    """The table, in Markdown."""
    rollouts = statistics.median(record["seconds"]["rollout"] for record in found["sync"])
    teacher = statistics.median(record["seconds"]["teacher"] for record in found["sync"])
    lines = [
        f"rollouts {rollouts:.2f} s, teacher {teacher / rollouts:.2f} of it; {bench.samples} responses a step, "
        f"{bench.engine.seconds_per_token * 1000:.2f} ms a token",
        "",
        "| schedule | step (s) | steps an hour | against sync | waiting for text (s) | predicted (s) | measured / predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    for schedule, records in found.items():
        seconds = statistics.median(record["step_seconds"] for record in records)
        ratio = statistics.median(
            sync["step_seconds"] / mine["step_seconds"] for sync, mine in zip(found["sync"], records, strict=True)
        )
        waiting = statistics.median(record["seconds"]["rollout"] for record in records)
        predicted = statistics.median(
            predict(bench, schedule, number, sync) for number, sync in enumerate(found["sync"])
        )
        lines.append(
            f"| {schedule} | {seconds:.2f} | {3600 / seconds:.0f} | {ratio:.2f} | {waiting:.2f} | {predicted:.2f} | "
            f"{seconds / predicted:.2f} |"
        )
    return "\n".join(lines)


def predict(bench: Bench, schedule: str, number: int, sync: dict[str, Any]) -> float:
    """Seconds of the round's last step by simulation, with the rates that its sync step showed."""
    text, section = bench.trainer.text, bench.config.rollout
    prompts = text.source.batch(3 * number + 5, section.prompts_per_step)

    requests = make_requests(prompts, section.responses_per_prompt)
    lengths = [len(r.response_ids) for r in bench.engine.engine.generate(requests, text.params, 3 * number + 5)]
    seconds = sync["seconds"]
    learned = sum(seconds.get(phase, 0.0) for phase in ("teacher", "exchange", "student"))
    rest = sync["step_seconds"] - learned - seconds["rollout"]
    learner = Learner(learned / sum(lengths), 0.0, rest)
    decoder = Decoder(slots=len(lengths), fixed_seconds=bench.engine.seconds_per_token)
    group = section.overlap_tokens or max(1, text.most_tokens // 8)
    return simulate(schedule, decoder.finish_times(lengths), lengths, learner, 0.0, group).seconds


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Where a step goes, as bars."""
    figure, axes = plt.subplots(figsize=(7, 2.6))
    left = dict.fromkeys(found, 0.0)
    for phase in ("rollout", "teacher", "exchange", "student", "optimizer", "rest"):
        values = {}
        for schedule, records in found.items():
            known = statistics.median(record["seconds"].get(phase, 0.0) for record in records)
            whole = statistics.median(record["step_seconds"] for record in records)
            values[schedule] = whole - left[schedule] if phase == "rest" else known
        name = "waiting for text" if phase == "rollout" else phase
        axes.barh(list(found), list(values.values()), left=list(left.values()), label=name)
        left = {schedule: left[schedule] + values[schedule] for schedule in found}
    axes.set_xlabel("seconds of a step")
    axes.invert_yaxis()
    axes.legend(ncols=3, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    quiet_libraries()
    with one_line_errors():
        typer.run(main)
