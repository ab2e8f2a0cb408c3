"""Cases of the matrix on gloo ranks, one after the other in the same processes, each checked on every rank."""

from __future__ import annotations

import datetime
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoints_conversion import read_architecture
from checkpoints_conversion.live.weights import stream_hf_weights
from oprd_megatron.models import Model, build_model
from oprd_megatron.objectives.output_loss import OutputLoss
from oprd_megatron.optimizer import build_optimizer, stream_gradients
from oprd_megatron.parallel import GridLayout, check_ranks, resolve_layout, tp_divisible
from oprd_megatron.parallel.grid import build_grid, init_mcore_globals
from oprd_megatron.platform import select_platform
from oprd_megatron.representation.alignment import Alignment
from oprd_megatron.representation.batch import BatchPlan
from oprd_megatron.representation.flow import Passes
from oprd_megatron.representation.grids import follow_student
from oprd_megatron.representation.layer_map import resolve_layer_pairs
from oprd_megatron.representation.space import Linear
from tests.parity.cases import BRIDGE_RANK, PAIRS, Case
from tests.parity.reference import OPTIMIZER, STEPS, Reference, batches

LOSS = 1e-6
"""Relative."""
GRADIENT = 1e-5
"""Of the largest element of the gradient: fp32 sums in another order."""
OUTPUT_GRADIENT = 2e-5
"""The same with output-space terms: p (log p - log q - KL), and 1 - q/p of k3, cancel to a few digits less."""
PARAMETER = 1e-5
"""Absolute, after three steps of lr 1e-3."""


def run_cases(folder: Path, stores: Path, cases: list[tuple[Case, str, str | None]]) -> list[str]:
    """Run cases of one world size. Each is (case, key of its reference, bridge file). Returns what differs.

    Args:
        folder: models and references.
        stores: an empty folder, where ranks meet.
        cases: one after the other.
    """
    problems = []
    for number, (case, key, bridge) in enumerate(cases):
        _fresh_world(stores, number)
        reference = torch.load(folder / f"{key}.pt", weights_only=False)
        problems += [f"[{case.text}] {problem}" for problem in _check(folder, case, bridge, reference)]
    return problems


def _fresh_world(stores: Path, number: int) -> None:
    """Drop the process groups of the case before."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{stores}/world_{size}_{number}", rank=rank, world_size=size, timeout=timeout
    )


def build_alignment(folder: Path, case: Case, bridge: str | None) -> tuple[Alignment, OutputLoss | None]:
    """Both models of a case on this rank, and its output-space terms if it has any."""
    platform, distill = select_platform("cpu"), case.distill_config(bridge)
    directories = [folder / case.pair / name for name in ("teacher", "student")]
    architectures = [read_architecture(path) for path in directories]
    pairs = resolve_layer_pairs(distill, architectures[1].num_layers, architectures[0].num_layers)

    def resolve(which: int, stages: tuple[int, ...] | None = None) -> GridLayout:
        parallel = (case.teacher, case.student)[which]
        if parallel.layers_per_stage == "follow_student":
            parallel = parallel.model_copy(update={"layers_per_stage": None})
        return resolve_layout(
            parallel, name="parallel", world_size=case.world, num_layers=architectures[which].num_layers,
            divisible=tp_divisible(architectures[which], pad_heads=False), layers_per_stage=stages,
        )  # fmt: skip

    layouts = [resolve(0), resolve(1)]
    check_ranks(layouts[0], layouts[1], case.world)
    if case.teacher.layers_per_stage == "follow_student":
        from oprd_megatron.representation.batch import Planner

        layouts[0] = resolve(0, follow_student(Planner(pairs, *layouts, distill, 4, 1), batches()[0]))
    models = []
    for which, layout in enumerate(layouts):
        with platform.scope():
            grid = build_grid(layout)
            init_mcore_globals(0, grid.coords.tp if grid.is_member else 0)
        models.append(
            build_model(
                architectures[which], grid, platform, dtype=torch.float32, hf_dir=directories[which], frozen=which == 0,
                recompute=case.recompute if which == 1 else None,
                vocab_size=max(architecture.vocab_size for architecture in architectures),
            )
        )  # fmt: skip
    output = OutputLoss(*models, case.output_config, platform.device) if case.output_config.terms else None
    alignment = Alignment(
        *models, distill, platform, micro_batch_size=1, micro_batch_tokens=case.micro_batch_tokens,
        signal=output.signal if output else None,
    )  # fmt: skip
    return alignment, output


def _check(folder: Path, case: Case, bridge: str | None, reference: Reference) -> list[str]:
    alignment, output = build_alignment(folder, case, bridge)
    student, problems = alignment.student, []
    optimizer = batch = None
    limit = OUTPUT_GRADIENT if output else GRADIENT
    if student.grid.is_member:
        settings = OPTIMIZER.model_copy(update={"distributed": case.distributed})
        optimizer = build_optimizer(student, settings, STEPS, alignment.platform, trains_head=output is not None)
    for step, samples in enumerate(batches()):
        progress = step / (STEPS - 1)
        alignment.advance(progress)
        plan = alignment.plan(samples)
        if optimizer:
            optimizer.zero_grad()
        weights = output.weights(progress) if output else {}
        batch = output.of_batch(plan, weights) if output else None
        chunks, on_outputs = optimizer.chunks if optimizer else None, batch.on_outputs if batch else None
        passes = Passes(train=True, chunks=chunks, on_outputs=on_outputs)
        loss = alignment.reduce(alignment.run(plan, passes)).loss
        if batch is not None:
            loss += sum(weights[name] * value for name, value in batch.means().items())
        if abs(loss - reference.losses[step]) > LOSS * abs(reference.losses[step]):
            problems.append(f"loss of step {step}: {loss}, not {reference.losses[step]}")
        problems += _bytes_problems(alignment, plan, case)
        if step == 0 and optimizer is not None and not case.distributed:
            gradients = {name: tensor.clone() for name, tensor in stream_gradients(student)}
            problems += _differences("gradient", gradients, reference.gradients, relative=limit)
            of_maps = {layer: weight.main_grad for layer, weight in _maps(alignment).items()}  # type: ignore[attr-defined]
            problems += _map_differences("gradient", alignment, of_maps, reference.map_gradients, relative=limit)
        if optimizer is not None:
            norm = optimizer.step()
            if step == 0 and abs(norm - reference.norm) > GRADIENT * reference.norm:
                problems.append(f"gradient norm {norm}, not {reference.norm}")
    if student.grid.is_member:
        problems += _differences("parameter", _parameters(student), reference.parameters, absolute=PARAMETER)
        problems += _map_differences("value", alignment, _maps(alignment), reference.maps, absolute=PARAMETER)
    return problems


def _maps(alignment: Alignment) -> dict[int, torch.Tensor]:
    """{student layer: W} of this rank."""
    return dict(alignment.space.weights) if isinstance(alignment.space, Linear) else {}


def _map_differences(
    what: str, alignment: Alignment, found: dict[int, torch.Tensor], expected: dict[int, torch.Tensor], **limits: float
) -> list[str]:
    """Of the trained maps; this rank has those of its layers, whole."""
    grid = alignment.student.grid
    here = [layer for layer in expected if grid.layout.stage_of(layer) == grid.coords.pp]
    if sorted(found) != sorted(here):
        return [f"rank {dist.get_rank()}: maps of layers {sorted(found)}, not {sorted(here)}"]
    named = [{str(layer): part[layer].detach() for layer in here} for part in (found, expected)]
    return _differences(f"map's {what} of layer", *named, **limits)


def _bytes_problems(alignment: Alignment, plan: BatchPlan, case: Case) -> list[str]:
    sent = torch.tensor([alignment.sent_bytes], dtype=torch.int64)
    dist.all_reduce(sent)
    planned, problems = alignment.planned_bytes(plan), []
    if sent.item() != planned:
        problems.append(f"{sent.item()} bytes sent, {planned} planned")
    budget = alignment.config.spool_bytes
    if budget is not None and alignment.peak_bytes > budget:
        problems.append(f"{alignment.peak_bytes} bytes held, {budget} allowed")
    teacher, student = (model.grid.layout for model in (alignment.teacher, alignment.student))
    if set(teacher.ranks).isdisjoint(student.ranks) and planned != _bytes_apart(alignment, plan, case):
        problems.append(f"{planned} bytes, not {_bytes_apart(alignment, plan, case)}")
    return problems


def _bytes_apart(alignment: Alignment, plan: BatchPlan, case: Case) -> int:
    """What travels between models on ranks of their own: every state that a student stage compares (through a bridge r numbers
    of it), and, of every response token that some term supervises, the teacher's final state or what the terms read."""
    student, config, teacher_width = alignment.student.grid.layout, alignment.config, PAIRS[case.pair][2][1]
    width = BRIDGE_RANK - config.bridge_head if config.bridge is not None else teacher_width
    wanted = {(student.stage_of(pair.student_layer), pair.teacher_layer) for pair in alignment.pairs}
    output, tokens = case.output_config, 0
    for sample in plan.samples:
        last_first = [{"all": 999, "last": 1}.get(t.positions, t.first_or_last) for t in output.terms]
        ends = [(k, t.positions == "first_k") for k, t in zip(last_first, output.terms, strict=True)]
        length = len(sample.response_ids)
        tokens += sum(any(i < k if first else length - i <= k for k, first in ends) for i in range(length))
    columns = teacher_width
    if output.teacher_head == "teacher":
        columns = sum(2 * term.k if term.kind == "topk" else 1 for term in output.terms)
    return 4 * (plan.num_tokens * len(wanted) * width + tokens * columns)


def _parameters(student: Model) -> dict[str, torch.Tensor]:
    """Whole parameters under HF names, as every rank of the grid sees them."""
    groups = student.grid.groups
    stream = stream_hf_weights(student.chunks, student.architecture, student.sharding, groups.tp, groups.pp)
    return {name: tensor.clone() for name, tensor in stream}


def _differences(
    what: str,
    found: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    relative: float = 0.0,
    absolute: float = 0.0,
) -> list[str]:
    problems = []
    for name, tensor in expected.items():
        limit = absolute + relative * tensor.abs().max().item()
        difference = (found[name] - tensor).abs().max().item()
        if not difference <= limit:
            problems.append(f"rank {dist.get_rank()}: {what} {name}: {difference:.2e} > {limit:.2e}")
    if what == "gradient":
        problems += [f"gradient of {name}, which has none" for name in set(found) - set(expected) if found[name].any()]
    return problems
