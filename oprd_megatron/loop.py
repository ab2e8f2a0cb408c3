"""A run from its first step to its report, on this rank."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from oprd_megatron.benchmarks.in_loop import InLoop
from oprd_megatron.bridge.health import Health
from oprd_megatron.checkpoint import BRIDGE, Progress, load_checkpoint
from oprd_megatron.config import RunConfig, dump_config
from oprd_megatron.errors import StoppedEarly
from oprd_megatron.evaluation.several import Evaluation
from oprd_megatron.evaluation.summary import print_summary
from oprd_megatron.logging import METRICS_FILE, Loggers, read_records, write_atomically
from oprd_megatron.logging.build import open_loggers
from oprd_megatron.logging.memory import world_memory_mib, world_peak_memory_bytes
from oprd_megatron.noise.gate import NoiseGate, gate_from_file
from oprd_megatron.noise.measure import measured_gate, prompt_samples
from oprd_megatron.parallel.activity import here
from oprd_megatron.parallel.agreement import together
from oprd_megatron.parallel.hang import Hang
from oprd_megatron.parallel.heartbeat import heartbeat
from oprd_megatron.placing import PlacedTeacher, build_all
from oprd_megatron.planning.room import check_device
from oprd_megatron.platform import Platform, init_distributed, select_platform
from oprd_megatron.preflight import Checked, preflight
from oprd_megatron.representation.space import LowRank, resume_bridge
from oprd_megatron.rollout.buffer import FOLDER as ROLLOUTS
from oprd_megatron.rollout.buffer import clear
from oprd_megatron.rollout.build import prepare_engine
from oprd_megatron.run_directory import check_run_dir
from oprd_megatron.run_facts import environment, planned_text, world_hosts
from oprd_megatron.run_files import CONFIG_FILE, ENVIRONMENT_FILE, PLAN_FILE
from oprd_megatron.run_lock import run_lock
from oprd_megatron.saving import Saver
from oprd_megatron.stopping import Stopping
from oprd_megatron.stragglers import Stragglers, peers_of
from oprd_megatron.trainer import Trainer, export_student

messages = logging.getLogger(__name__)

MINUTES_TO_REPORT = 10.0
"""Collectives time out so much after `run.hang_minutes`."""


def train(config: RunConfig) -> None:
    """Train from a config to its last step, from the newest checkpoint if there is one."""
    started = time.perf_counter()
    platform = select_platform(config.run.device)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    checked = preflight(config, world_size)
    if platform.is_cuda:
        gpu_memory = torch.cuda.get_device_properties(platform.device).total_memory
        check_device(config, world_size, gpu_memory, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    minutes = config.run.hang_minutes
    hang = Hang(60 * minutes, config.run.dir / "hang") if minutes else None
    init_distributed(platform, max(30.0, minutes + MINUTES_TO_REPORT))
    with run_lock(config.run.dir), heartbeat(hang=hang), Stopping(config.run, platform) as stopping:
        checked = replace(checked, resume_from=check_run_dir(config))  # another run may just have ended here
        with Saver(config, platform) as saver:
            run(checked, platform, started, stopping, saver)


def run(checked: Checked, platform: Platform, started: float, stopping: Stopping, saver: Saver) -> None:
    """All of a run that its ranks do together; `started` is a reading of `time.perf_counter`."""
    config = checked.config
    if is_finished(config):
        show_result(config)
        return
    benchmark, writer = None, checked.writer
    if config.benchmark is not None:  # its files are read before models load
        benchmark = InLoop(
            config.benchmark, checked.tokenizer, config.rollout.max_response_tokens, checked.student_vocab_size
        )
        writer = benchmark.asked_of(writer)
    make_engine = prepare_engine(writer, checked.student_layout, platform)
    with here.phase("models"):
        teachers, student = build_all(checked, platform)
    held_out = Evaluation(checked, teachers, student, platform) if config.eval else None
    trainer = Trainer(checked, teachers, student, platform, make_engine)
    space = None if config.teachers else teachers[0].space  # which a refit may change, and a checkpoint then holds
    progress = Progress(step=0, weight_version=0)
    if checked.resume_from is not None:
        progress = load_checkpoint(checked.resume_from, student, trainer.optimizer, platform, trainer.average)
        saver.resumed(checked.resume_from)
        if space is not None:
            resume_bridge(space, checked.resume_from / BRIDGE, checked.pairs, teachers[0].model, student)
    shows = config.rollout.engine != "file"  # recorded text has no answers to held-out prompts
    logger = open_run(config, progress, fresh=checked.resume_from is None)
    health, gates = watch_bridges(config, teachers), noise_gates(trainer, platform)
    peers = peers_of([teacher.model for teacher in teachers], student, writes=trainer.engine is not None)
    stragglers = Stragglers(peers, config.logging.slow_rank_factor)
    trainer.sync(progress.weight_version)
    if held_out and checked.resume_from is None:
        with here.phase("eval"):
            record = held_out.record(0, trainer.engine, samples=shows)
        saver.note(record)
        log(logger, record)
        warnings(health, record)  # what later ones are held against
    if benchmark and checked.resume_from is None:
        with here.phase("benchmark"):
            record = benchmark.record(0, trainer.engine)
        saver.note(record)
        log(logger, record)
    last = min(config.run.steps, config.run.stop_at or config.run.steps)
    for step in range(progress.step, last):
        here.step = step + 1
        record = trainer.step(step)
        slowest, memory = stragglers.record(trainer.own_seconds), world_memory_mib(platform.device)
        log(logger, {**record, "memory_mib": memory, **({"stragglers": slowest} if slowest else {})})
        for line in [*noise_warnings(gates, record), *stragglers.warnings(slowest)]:
            messages.warning(line)
        progress = Progress(step + 1, trainer.weight_version)
        if held_out and held_out.due(progress.step, config.run.steps):
            is_last = progress.step == config.run.steps
            with here.phase("eval"):
                record = held_out.record(progress.step, trainer.engine, samples=is_last and shows)
            saver.note(record)
            log(logger, record)
            for line in warnings(health, record):
                messages.warning(line)
        if benchmark and benchmark.due(progress.step, config.run.steps):
            with here.phase("benchmark"):
                record = benchmark.record(progress.step, trainer.engine)
            saver.note(record)
            log(logger, record)
        saver.poll()
        reason = stopping.reason() if progress.step < last else None
        if progress.step == last or reason:
            trainer.close()  # the engine's copy of the student need not be there while saving and exporting
        due = config.checkpoint.every and progress.step % config.checkpoint.every == 0
        if progress.step == last or reason or due:
            bridge = space.whole if isinstance(space, LowRank) else None
            saver.save(student, trainer.optimizer, progress, bridge, trainer.average)
        if reason:
            saver.finish()
            log(logger, {"kind": "stopped", "step": progress.step, "reason": reason})
            logger.close()
            raise StoppedEarly(
                f"step {progress.step} of {config.run.steps} because {reason}; a checkpoint is saved, the same command goes on"
            )
    finished = progress.step == config.run.steps
    export = config.run.dir / "student_hf" if config.run.export and finished else None
    if export:
        with here.phase("export"):
            export_student(student, config.student.path, export, overwrite=True)
    saver.finish()
    summary = {
        "kind": "summary",
        "step": progress.step,
        "wall_seconds": time.perf_counter() - started,
        "peak_memory_bytes": world_peak_memory_bytes(platform.device),
        "ranks": dist.get_world_size(),
        "export": str(export) if export else None,
    }
    log(logger, summary)
    logger.close()
    show_result(config)


def watch_bridges(config: RunConfig, teachers: Sequence[PlacedTeacher]) -> dict[str, Health]:
    """{teacher: what follows its bridge from here on, and from what the run has measured so far}, for teachers with one."""
    metrics = config.run.dir / METRICS_FILE
    health = {t.name: Health(config.bridge.warn_drop) for t in teachers if isinstance(t.space, LowRank)}
    for record in read_records(metrics) if health and metrics.exists() else []:
        if record["kind"] == "eval":
            warnings(health, record)
    return health


def warnings(health: dict[str, Health], record: dict[str, Any]) -> list[str]:
    """What there is to say about the bridges after an evaluation."""
    if "teachers" not in record:
        return [line for watch in health.values() for line in watch.warnings(record)]
    return [
        f"teacher {name}: {line}"
        for name, watch in health.items()
        if name in record["teachers"]
        for line in watch.warnings({**record["teachers"][name], "step": record["step"]})
    ]


def noise_gates(trainer: Trainer, platform: Platform) -> dict[str, NoiseGate]:
    """{teacher: what watches the noise of its rounding}, for teachers whose `precision.noise` asks for it. Collective."""
    gates = {}
    for lesson in trainer.lessons:
        checked = lesson.placed.checked
        precision = checked.config.teacher.precision
        if precision.noise_file is not None:
            gates[lesson.name] = gate_from_file(checked.config, lesson.alignment.pairs)
        elif precision.noise == "measure":
            with lesson.placed.at_work():
                samples = prompt_samples(checked)
                gates[lesson.name] = measured_gate(checked, lesson.alignment, samples, platform)
    return gates


def noise_warnings(gates: dict[str, NoiseGate], record: dict[str, Any]) -> list[str]:
    """What there is to say about rounding after a step."""
    of_teachers, found = record.get("teachers", {}), []
    for name, gate in gates.items():
        layers = of_teachers.get(name, {} if of_teachers else record).get("layers")
        whose = f"teacher {name}: " if of_teachers else ""
        found += [f"{whose}{line}" for line in (gate.warnings(layers, record["step"]) if layers else [])]
    return found


def is_finished(config: RunConfig) -> bool:
    """Whether the run directory holds this run with all its steps done: its last record is the summary of the last step."""
    metrics = config.run.dir / METRICS_FILE
    records = read_records(metrics) if metrics.exists() else []
    return bool(records) and records[-1]["kind"] == "summary" and records[-1]["step"] == config.run.steps


def show_result(config: RunConfig) -> None:
    """Print what came out, on rank 0, and leave the process group."""
    if dist.get_rank() == 0:
        from oprd_megatron.evaluation.report import write_report  # here, so that other ranks do not carry matplotlib

        print_summary(config.run.dir, write_report(config.run.dir))
    dist.destroy_process_group()


def open_run(config: RunConfig, progress: Progress, fresh: bool) -> Loggers:
    """Create the run directory and its loggers on rank 0; other ranks log to nobody. Collective."""
    loggers, folder = Loggers([]), config.run.dir
    hosts = world_hosts()
    with together(f"preparing {folder}"):
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / CONFIG_FILE, dump_config(config))
            write_atomically(folder / ENVIRONMENT_FILE, json.dumps(environment(config, hosts), indent=1))
            write_atomically(folder / PLAN_FILE, planned_text(config, hosts))
            if fresh:
                clear(folder / ROLLOUTS)
            loggers = open_loggers(config, None if fresh else progress.step)
    return loggers


def log(logger: Loggers, record: dict[str, Any]) -> None:
    """Write a record on rank 0; a full disk stops every rank. Collective."""
    with together("writing metrics"):
        logger.log(record)
