"""A run from its first step to its report, on this rank."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from oprd_megatron.benchmarks.in_loop import InLoop
from oprd_megatron.config import RunConfig, dump_config
from oprd_megatron.errors import StoppedEarly
from oprd_megatron.evaluation.several import Evaluation
from oprd_megatron.evaluation.summary import print_summary
from oprd_megatron.logging import METRICS_FILE, Loggers, read_records, write_atomically
from oprd_megatron.logging.build import open_loggers
from oprd_megatron.logging.memory import world_peak_memory_bytes
from oprd_megatron.measuring import Measuring
from oprd_megatron.models import Model
from oprd_megatron.parallel.activity import here
from oprd_megatron.parallel.agreement import together
from oprd_megatron.parallel.hang import Hang, collective_minutes
from oprd_megatron.parallel.heartbeat import heartbeat
from oprd_megatron.placing import build_all
from oprd_megatron.planning.room import check_device
from oprd_megatron.platform import Platform, init_distributed, select_platform
from oprd_megatron.preflight import Checked, preflight
from oprd_megatron.representation.space import LowRank, resume_bridge
from oprd_megatron.rollout.buffer import FOLDER as ROLLOUTS
from oprd_megatron.rollout.buffer import clear
from oprd_megatron.rollout.build import prepare_engine
from oprd_megatron.run_directory.checks import check_run_dir
from oprd_megatron.run_directory.facts import environment, planned_text, world_hosts
from oprd_megatron.run_directory.files import CONFIG_FILE, ENVIRONMENT_FILE, PLAN_FILE
from oprd_megatron.run_directory.lock import run_lock
from oprd_megatron.saving.checkpoint import BRIDGE, Progress, load_checkpoint
from oprd_megatron.saving.saver import Saver
from oprd_megatron.stopping import Stopping
from oprd_megatron.trainer import Trainer, export_student
from oprd_megatron.watch import Watch


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
    init_distributed(platform, collective_minutes(minutes))
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
    measuring = Measuring(config, held_out, benchmark)
    trainer = Trainer(checked, teachers, student, platform, make_engine)
    space = None if config.teachers else teachers[0].space  # which a refit may change, and a checkpoint then holds
    progress = Progress(step=0, weight_version=0)
    if checked.resume_from is not None:
        progress = load_checkpoint(checked.resume_from, student, trainer.optimizer, platform, trainer.average)
        saver.resumed(checked.resume_from)
        if space is not None:
            resume_bridge(space, checked.resume_from / BRIDGE, checked.pairs, teachers[0].model, student)
    logger = open_run(config, progress, fresh=checked.resume_from is None)
    watch = Watch(config, trainer, teachers, student, platform)

    def measure(step: int) -> None:
        for record in measuring.records(step, trainer.engine):
            saver.note(record)
            log(logger, record)
            if record["kind"] == "eval":
                watch.evaluation(record)

    trainer.sync(progress.weight_version)
    if checked.resume_from is None:
        measure(0)
    last, every = min(config.run.steps, config.run.stop_at or config.run.steps), config.checkpoint.every
    for step in range(progress.step, last):
        here.step = step + 1
        log(logger, watch.step(trainer.step(step)))
        progress = Progress(step + 1, trainer.weight_version)
        measure(progress.step)
        saver.poll()
        reason = stopping.reason() if progress.step < last else None
        ends = progress.step == last or reason is not None
        if ends:
            trainer.close()  # the engine's copy of the student need not be there while saving and exporting
        if ends or (every and progress.step % every == 0):
            bridge = space.whole if isinstance(space, LowRank) else None
            saver.save(student, trainer.optimizer, progress, bridge, trainer.average)
        if reason:
            saver.finish()
            log(logger, {"kind": "stopped", "step": progress.step, "reason": reason})
            logger.close()
            raise StoppedEarly(
                f"step {progress.step} of {config.run.steps} because {reason}; a checkpoint is saved, the same command goes on"
            )
    export = export_finished(config, student, progress)
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


def export_finished(config: RunConfig, student: Model, progress: Progress) -> Path | None:
    """Write the student of a run whose last step is done as a Hugging Face directory, unless it is not wanted. Collective."""
    if not config.run.export or progress.step < config.run.steps:
        return None
    folder = config.run.dir / "student_hf"
    with here.phase("export"):
        export_student(student, config.student.path, folder, overwrite=True)
    return folder


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
