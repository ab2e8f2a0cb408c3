"""`oprd doctor --precision`: the noise of a teacher in fp8, as a table and as a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
import typer

from oprd_megatron.config import RunConfig
from oprd_megatron.config.precision import PrecisionConfig
from oprd_megatron.config.teachers import refuse_several
from oprd_megatron.errors import ConfigError
from oprd_megatron.logging import write_atomically
from oprd_megatron.noise.compare import Noise
from oprd_megatron.noise.gate import LIMIT, described, share_of_noise
from oprd_megatron.noise.measure import measure_noise, prompt_samples
from oprd_megatron.parallel.agreement import together
from oprd_megatron.parallel.heartbeat import heartbeat
from oprd_megatron.placing import build_models
from oprd_megatron.platform import Platform, init_distributed, select_platform
from oprd_megatron.preflight import Checked, preflight
from oprd_megatron.representation.alignment import Alignment
from oprd_megatron.representation.batch import filled_up

SHOWN = 5
"""Layers named that add the most noise."""


def diagnose_precision(config: RunConfig, out: Path | None) -> None:
    """Measure, print a table on rank 0, and write `out`. Collective.

    Raises:
        ConfigError: the run compares no states.
    """
    refuse_several(config, "oprd doctor --precision")
    if config.distill.space == "none":
        raise ConfigError(
            "distill.mode: none compares no states, so there is nothing that noise could be measured against"
        )
    platform = select_platform(config.run.device)
    checked = preflight(unmeasured(config), int(os.environ.get("WORLD_SIZE", "1")), starts_run=False)
    init_distributed(platform)
    with heartbeat():
        noise, losses = measure(checked, platform)
        with together("writing the noise"):
            if dist.get_rank() == 0:
                for line in table(checked, noise, losses):
                    typer.echo(line)
                if out is not None:
                    record = {**described(checked.config), **noise.as_json()}
                    record["layers"]["student_loss"] = losses
                    write_atomically(out, json.dumps(record, indent=1))
    dist.destroy_process_group()


def unmeasured(config: RunConfig) -> RunConfig:
    """The run without what only a measurement can tell; a teacher with nothing in fp8 is taken as weight_only."""
    precision = config.teacher.precision.model_copy(update={"noise": "off", "keep_worst": 0})
    if not precision.is_quantised:
        precision = PrecisionConfig(linear="weight_only")
    return config.model_copy(update={"teacher": config.teacher.model_copy(update={"precision": precision})})


def measure(checked: Checked, platform: Platform) -> tuple[Noise, list[float]]:
    """The noise, and the student's loss at each supervised layer on the same text. Collective."""
    config = checked.config
    teacher, student = build_models(checked, platform)
    alignment = Alignment(
        teacher, student, config.distill, platform, config.run.micro_batch_size, config.run.micro_batch_tokens
    )
    samples = prompt_samples(checked)
    plan = alignment.plan(filled_up(samples, alignment.flow.planner.unit))
    losses = alignment.reduce(alignment.run(plan)).layer_loss
    return measure_noise(checked, alignment, samples, platform), losses


def table(checked: Checked, noise: Noise, losses: list[float]) -> Iterator[str]:
    """One line for each supervised layer, then what to do."""
    precision, through = checked.config.teacher.precision, checked.config.distill.bridge is not None
    what = precision.linear + (f" ({precision.recipe})" if precision.linear == "fp8" else "")
    yield f"teacher {checked.config.teacher.path}, precision.linear: {what}, against {checked.config.teacher.dtype}"
    bridge = f"{'through the bridge':>22}" if through else ""
    yield f"{'student':>8}{'teacher':>8}{'1 - cosine':>12}{'error':>9}{bridge}{'student':>10}{'noise /':>9}"
    parts = f"{'1 - cosine':>13}{'error':>9}" if through else ""
    yield f"{'layer':>8}{'layer':>8}{'':>12}{'':>9}{parts}{'distance':>10}{'student':>9}"
    above = []
    for number, (pair, loss) in enumerate(zip(noise.pairs, losses, strict=True)):
        layer, share = pair.teacher_layer - 1, share_of_noise(noise.loss[number], loss)
        seen = f"{1 - noise.space_cosine[number]:>13.1e}{noise.space_error[number]:>9.4f}" if through else ""
        flag = "  above a tenth" if share > LIMIT else ""
        above += [pair.student_layer] if share > LIMIT else []
        yield (
            f"{pair.student_layer:>8}{pair.teacher_layer:>8}{1 - noise.cosine[layer]:>12.1e}{noise.error[layer]:>9.4f}{seen}"
            f"{loss**0.5:>10.4f}{share:>9.3f}{flag}"
        )
    worst = ", ".join(f"{layer} ({noise.own[layer - 1]:.4f})" for layer in noise.worst[:SHOWN])
    yield f"teacher layers that add the most noise of their own: {worst or 'none'}"
    if above:
        yield (
            f"warn  precision  noise is more than {LIMIT:g} of the student's distance at student layers {above}: keep teacher "
            "layers in dtype (teacher.precision.keep_worst with noise: FILE, or keep_layers), or use linear: dtype"
        )
    else:
        yield f"pass  precision  noise is at most {LIMIT:g} of the student's distance at every supervised layer"
