"""The checks of `oprd doctor`, on the user's machines, models and layouts. Every check is collective over the world.

    versions              what is installed, the same on all ranks, and what is missing costs
    bytes                 what the exchange sent is what the plan says
    gradient              loss and gradient of the student's layout against a smaller one on the same ranks
    student = teacher     a teacher of itself, in both layouts, gives 0

Memory: the models of the run and a second copy of the student at a time; no optimizer states.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform as machine
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
import typer

from oprd_megatron.config import RunConfig
from oprd_megatron.config.precision import PrecisionConfig
from oprd_megatron.config.teachers import refuse_several
from oprd_megatron.errors import LayoutError
from oprd_megatron.models import Model
from oprd_megatron.models.spec import has_transformer_engine
from oprd_megatron.optimizer import build_optimizer, stream_gradients
from oprd_megatron.parallel import GridLayout, resolve_layout, tp_divisible
from oprd_megatron.parallel.heartbeat import heartbeat
from oprd_megatron.placing import place_model
from oprd_megatron.platform import Platform, init_distributed, select_platform
from oprd_megatron.preflight import Checked, preflight
from oprd_megatron.representation.alignment import Alignment
from oprd_megatron.representation.batch import Sample
from oprd_megatron.rollout import Rollout

PROMPT_TOKENS, RESPONSE_TOKENS = 16, 16
"""Of each sample of the checks."""

TOLERANCE = {"fp32": 1e-5, "bf16": 0.1}
"""Largest relative difference between two layouts: of the loss, and of each gradient tensor by its norm. Rounding differs."""

SELF_TOLERANCE = {"fp32": 1e-6, "bf16": 1e-2}
"""Largest 1 - cosine between a model and itself in two layouts."""


@dataclass(frozen=True)
class Finding:
    """One check's result."""

    check: str
    verdict: Literal["pass", "FAIL", "skip"]
    detail: str

    def __str__(self) -> str:
        return f"{self.verdict:4}  {self.check:18}  {self.detail}"


def diagnose(config: RunConfig) -> bool:
    """Run all checks and print a line for each, on rank 0. Returns whether none failed."""
    refuse_several(config, "oprd doctor")
    platform = select_platform(config.run.device)
    checked = preflight(config, int(os.environ.get("WORLD_SIZE", "1")), starts_run=False)
    init_distributed(platform)
    sound = True
    with heartbeat():
        for finding in findings(checked, platform):
            sound = sound and finding.verdict != "FAIL"
            if dist.get_rank() == 0:
                typer.echo(finding)
    dist.destroy_process_group()
    return sound


def findings(checked: Checked, platform: Platform) -> Iterator[Finding]:
    """The checks, one after the other. Collective."""
    yield from versions(platform)
    world = dist.get_world_size()
    yield Finding(
        "config", "pass", f"{world} ranks; teacher {checked.teacher_layout}, student {checked.student_layout}"
    )
    samples = few_samples(checked)
    teacher = place_model(
        checked, checked.config.teacher, checked.teacher, checked.teacher_layout, platform, frozen=True
    )
    alignment, gradients = _gradients(checked, teacher, checked.student_layout, samples, platform)
    yield _bytes(alignment, samples)
    yield _gradient(checked, teacher, alignment, gradients, samples, platform)
    del teacher, alignment, gradients
    yield _self_teaching(checked, samples, platform)


def versions(platform: Platform) -> Iterator[Finding]:
    """What is installed, whether all ranks have the same, and what is missing costs."""
    mine = {name: _version(name) for name in ("torch", "megatron-core", "transformers", "transformer-engine", "apex")}
    mine["python"] = machine.python_version()
    if platform.is_cuda:
        mine["cuda"] = str(torch.version.cuda)
        mine["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        mine["driver"] = _driver()
        mine["gpu"] = torch.cuda.get_device_name()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    other = next((rank for rank, found in enumerate(everyone) if found != everyone[0]), None)
    text = ", ".join(f"{name} {value}" for name, value in everyone[0].items() if value)
    if other is None:
        yield Finding("versions", "pass", text)
    else:
        differing = [name for name in everyone[0] if everyone[0][name] != everyone[other][name]]
        pairs = ", ".join(f"{name} {everyone[0][name]} and {everyone[other][name]}" for name in differing)
        yield Finding(
            "versions", "FAIL", f"ranks 0 and {other} differ: {pairs}; install the same environment on all nodes"
        )
    if not platform.is_cuda:
        yield Finding("device", "pass", "CPU ranks on gloo: for trying things out; a GPU needs a CUDA build of torch")
    if not has_transformer_engine():
        yield Finding("transformer-engine", "skip", "absent: attention and norms are this project's own (SDPA); no FP8")
    if not _version("apex"):
        adam = "Transformer Engine's" if has_transformer_engine() else "torch's"
        yield Finding("apex", "skip", f"absent, which costs little: mcore uses {adam} Adam")


def few_samples(checked: Checked) -> list[Sample]:
    """Enough samples for both pipelines, a few tokens each, from the run's own prompts."""
    layouts = checked.teacher_layout, checked.student_layout
    world = max(layout.num_ranks for layout in layouts)
    size = checked.config.run.micro_batch_size * world * max(layout.pp for layout in layouts)
    length, rollouts = PROMPT_TOKENS + RESPONSE_TOKENS, []
    for number in range(size):
        prompt = checked.prompts[number % len(checked.prompts)]
        text = (prompt.token_ids * length)[: length - number % 3]
        rollouts.append(Rollout(prompt.index, number, text[:PROMPT_TOKENS], text[PROMPT_TOKENS:], 0, finished=False))
    return checked.sample_maker(checked.prompts).of_student(rollouts)


def _bytes(alignment: Alignment, samples: list[Sample]) -> Finding:
    sent = torch.tensor([alignment.sent_bytes])
    dist.all_reduce(sent)
    planned, measured = alignment.planned_bytes(alignment.plan(samples)), int(sent)
    verdict: Literal["pass", "FAIL"] = "pass" if planned == measured else "FAIL"
    advice = "" if planned == measured else "; this is a defect of the router: please report it with the config"
    return Finding("bytes", verdict, f"{measured:,} sent, {planned:,} planned for {len(samples)} samples{advice}")


def _gradient(
    checked: Checked,
    teacher: Model,
    alignment: Alignment,
    loss: float,
    samples: list[Sample],
    platform: Platform,
) -> Finding:
    layout = checked.student_layout
    smaller = smaller_layout(checked)
    if smaller is None:
        return Finding("gradient", "skip", f"student {layout} has no smaller layout on the same ranks to compare with")
    other, other_loss = _gradients(checked, teacher, smaller, samples, platform)
    worst, where = 0.0, ""
    if alignment.student.grid.is_member:
        pairs = zip(stream_gradients(alignment.student), stream_gradients(other.student), strict=True)
        for (name, mine), (_, reference) in pairs:
            difference = float((mine - reference).norm() / reference.norm().clamp_min(1e-12))
            worst, where = max((worst, where), (difference, name))
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (worst, where))
    worst, where = max(found)
    of_loss = abs(loss - other_loss) / max(abs(other_loss), 1e-30)
    limit = TOLERANCE[checked.config.student.dtype]
    text = f"loss {of_loss:.1e}, gradient {worst:.1e} (worst: {where}) off {smaller}; allowed {limit:g}"
    if max(worst, of_loss) <= limit:
        return Finding("gradient", "pass", text)
    return Finding("gradient", "FAIL", f"{text}; try other tp, cp or pp and report the layout that fails")


def _self_teaching(checked: Checked, samples: list[Sample], platform: Platform) -> Finding:
    config = checked.config
    try:
        layout = resolve_layout(
            config.teacher.parallel.model_copy(update={"layers_per_stage": None}),
            name="teacher.parallel",
            world_size=dist.get_world_size(),
            num_layers=checked.student.num_layers,
            divisible=tp_divisible(checked.student, config.student.pad_heads),
            token_multiple=config.teacher.precision.token_multiple,
        )
    except LayoutError as error:
        return Finding("student = teacher", "skip", f"the student does not fit the teacher's layout ({error})")
    section = config.student.model_copy(update={"dtype": config.teacher.dtype, "precision": PrecisionConfig()})
    copy = place_model(checked, section, checked.student, layout, platform, frozen=True)
    student = place_model(checked, section, checked.student, checked.student_layout, platform, frozen=True)
    distill = config.distill.model_copy(
        update={
            "mode": "identity",
            "bridge": None,
            "layer_map": "proportional",
            "layers": "all",
            "wire": "auto",
            "layer_weights": "uniform",
            "final_layer_weights": None,
        }
    )
    alignment = Alignment(copy, student, distill, platform, config.run.micro_batch_size, config.run.micro_batch_tokens)
    report = alignment.reduce(alignment.run(alignment.plan([replace(sample, teacher=None) for sample in samples])))
    distance, limit = max(1 - cosine for cosine in report.cosine), SELF_TOLERANCE[section.dtype]
    text = f"loss {report.loss:.1e}, 1 - cosine {distance:.1e} at most; allowed {limit:g}"
    if distance <= limit:
        return Finding("student = teacher", "pass", text)
    return Finding(
        "student = teacher", "FAIL", f"{text}; teacher {layout} and student {checked.student_layout} disagree"
    )


def smaller_layout(checked: Checked) -> GridLayout | None:
    """The student on the same ranks with half of one axis (cp, else tp, else pp) and twice the dp, without virtual
    stages; None if there is nothing to halve."""
    parallel = checked.config.student.parallel
    for axis in ("cp", "tp", "pp"):
        size = getattr(checked.student_layout, axis)
        if size % 2:
            continue
        changes: dict[str, Any] = {
            axis: size // 2,
            "dp": 2 * checked.student_layout.dp,
            "vpp": 1,
            "layers_per_stage": None,
        }
        changes |= {"first_stage_layers": None, "last_stage_layers": None}
        if axis == "tp" and size == 2:
            changes["sp"] = False
        return resolve_layout(
            parallel.model_copy(update=changes),
            name="student.parallel",
            world_size=dist.get_world_size(),
            num_layers=checked.student.num_layers,
            divisible={},
            token_multiple=checked.config.student.precision.token_multiple,
        )
    return None


def _gradients(
    checked: Checked, teacher: Model, layout: GridLayout, samples: list[Sample], platform: Platform
) -> tuple[Alignment, float]:
    """An alignment whose student, built in `layout`, holds the gradients of the samples; and the loss."""
    config = checked.config
    student = place_model(checked, config.student, checked.student, layout, platform, frozen=False)
    alignment = Alignment(
        teacher, student, config.distill, platform, config.run.micro_batch_size, config.run.micro_batch_tokens
    )
    chunks = None
    if student.grid.is_member:
        replicated = config.optimizer.model_copy(update={"distributed": False})
        optimizer = build_optimizer(student, replicated, 2, platform)
        optimizer.zero_grad()
        chunks = optimizer.chunks
    report = alignment.reduce(alignment.run(alignment.plan(samples), train=True, chunks=chunks))
    return alignment, report.loss


def _driver() -> str | None:
    """Version of the GPU's driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0] or None


def _version(package: str) -> str | None:
    """Installed version; apex counts only if it is NVIDIA's (the one on PyPI is another project)."""
    if package == "apex" and importlib.util.find_spec("amp_C") is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
