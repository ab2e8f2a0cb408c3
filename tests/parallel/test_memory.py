"""What a plan says a rank will hold, against the tensors that it does hold."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from checkpoints_conversion import Architecture, read_architecture
from oprd_megatron.config.schema import DistillConfig, OptimizerConfig, ParallelConfig, RecomputeConfig
from oprd_megatron.models import DTYPES, build_model
from oprd_megatron.optimizer import StudentOptimizer, build_optimizer
from oprd_megatron.parallel import GridLayout, resolve_layout, tp_divisible
from oprd_megatron.parallel.grid import build_grid, init_mcore_globals
from oprd_megatron.parallel.memory import ModelMemory, engine_bytes, peak_in_flight, peak_spooled
from oprd_megatron.platform import select_platform
from oprd_megatron.representation.alignment import Alignment
from oprd_megatron.representation.batch import Sample
from tests.qwen_configs import QWEN_7B, QWEN_72B, write_config
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

TEACHER_VOCAB, STUDENT_VOCAB = 600, 300
LOCAL_RATIO = (0.85, 1.15)
"""Measured activations over what is estimated for the local layers; what is left out is masks and statistics."""
TIMES_ESTIMATE, TIMES_ESTIMATE_SANDWICH = 2.1, 3.0
"""Measured activations are less than so many times what the plan says (1.5 in fp32); Gemma has four norms a layer."""
LONGEST = 48
"""Tokens of every sample."""


LINEAR = DistillConfig(
    mode="linear", layers=[1, 2, 5]
)  # maps of 80 x 80 numbers, two of them in the student's first half


@dataclass(frozen=True)
class Case:
    """One student on a grid; the teacher has the same grid unless told otherwise."""

    student: ParallelConfig
    world: int = 1
    teacher: ParallelConfig | None = None
    family: str = "llama"
    tied: bool = True
    dtype: str = "fp32"
    distributed: bool = False
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    pad_heads: bool = False
    trains_head: bool = False
    distill: DistillConfig = field(default_factory=DistillConfig)

    @property
    def parallel(self) -> tuple[ParallelConfig, ParallelConfig]:
        return self.teacher or self.student, self.student


CASES = {
    "one_rank": Case(ParallelConfig()),
    "one_rank_untied_distributed": Case(ParallelConfig(), tied=False, distributed=True, dtype="bf16"),
    "tp2sp_bf16": Case(ParallelConfig(tp=2, sp=True), 2, dtype="bf16"),
    "tp2_qwen3": Case(ParallelConfig(tp=2), 2, family="qwen3", tied=False),
    "tp4_padded_heads": Case(ParallelConfig(tp=4), 4, pad_heads=True),
    "pp2_tied": Case(ParallelConfig(pp=2), 2),
    "pp2_vpp2_full": Case(ParallelConfig(pp=2, vpp=2), 2, dtype="bf16", recompute=RecomputeConfig(granularity="full")),
    "pp3_uneven": Case(ParallelConfig(pp=3, layers_per_stage=[1, 4, 1]), 3, family="qwen2", tied=False),
    "block": Case(ParallelConfig(), recompute=RecomputeConfig(granularity="full", method="block", num_layers=2)),
    "groups_of_3": Case(ParallelConfig(), recompute=RecomputeConfig(granularity="full", num_layers=3)),
    "cp2_distributed": Case(ParallelConfig(cp=2), 2, distributed=True),
    "pp2_dp2_tied_distributed": Case(ParallelConfig(pp=2, dp=2), 4, dtype="bf16", distributed=True),
    "pp2_dp3_distributed": Case(ParallelConfig(pp=2, dp=3), 6, distributed=True),
    "pp2_vpp3_distributed_untied": Case(
        ParallelConfig(pp=2, vpp=3, dp=2), 4, family="qwen2", tied=False, distributed=True
    ),
    "experts": Case(ParallelConfig(), family="qwen3_moe"),
    "tp2sp_experts": Case(
        ParallelConfig(tp=2, sp=True), 2, ParallelConfig(tp=2), "mixtral", tied=False, distributed=True
    ),
    "pp2_experts_full": Case(ParallelConfig(pp=2), 2, family="mixtral", recompute=RecomputeConfig(granularity="full")),
    "gemma_bf16_distributed": Case(
        ParallelConfig(tp=2, sp=True), 2, family="gemma3_text", dtype="bf16", distributed=True
    ),
    "pp2_gemma": Case(ParallelConfig(pp=2), 2, family="gemma3_text"),
    "phi": Case(ParallelConfig(), family="phi3", tied=False),
    "head_tp2_distributed": Case(ParallelConfig(tp=2), 2, tied=False, distributed=True, trains_head=True),
    "head_pp2": Case(ParallelConfig(pp=2), 2, family="qwen2", tied=False, trains_head=True),
    "maps_tp2sp_bf16": Case(ParallelConfig(tp=2, sp=True), 2, dtype="bf16", distill=LINEAR),
    "maps_pp2_vpp3_distributed": Case(
        ParallelConfig(pp=2, vpp=3, dp=2), 4, tied=False, distributed=True, distill=LINEAR
    ),
    "disjoint": Case(ParallelConfig(tp=2, ranks="2-3"), 4, ParallelConfig(pp=2, ranks="0-1")),
}


@dataclass(frozen=True)
class LocalMemory(ModelMemory):
    """With what the local layers keep besides: they are not fused. Transformer Engine's norms and attention keep none of it."""

    def layer_numbers(self) -> float:
        architecture, layout = self.architecture, self.layout
        copies = 5 if self.dtype == "bf16" else 1  # x / rms and, in bf16, two fp32 copies of the norm's input
        groups = self.sharding.num_query_groups_padded / layout.tp
        heads = groups * architecture.heads_per_group
        norms = (4 if architecture.sandwich_norm else 2) * architecture.hidden_size / (layout.tp if layout.sp else 1)
        if architecture.qk_norm:
            norms += (heads + groups) * architecture.head_dim
        whole_qkv = heads + groups  # the value is a view of it
        repeated = 2 * (heads * layout.cp - groups)  # keys and values for every query head, and of the whole pack
        output = heads  # once as attention saves it, once as the projection's input
        rotary = 4  # cosines and sines, for queries and for keys
        attention = (whole_qkv + repeated + output + rotary) * architecture.head_dim
        return super().layer_numbers() + copies * norms + attention


@dataclass(frozen=True)
class Held:
    """Bytes on one rank."""

    teacher_weights: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    spool: int
    spool_planned: int


def samples() -> list[Sample]:
    """Twelve rollouts of 48 tokens."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda n: tuple(torch.randint(0, STUDENT_VOCAB, (n,), generator=generator).tolist())  # noqa: E731
    return [Sample(draw(16), draw(32)) for _ in range(12)]


def layouts(case: Case, architectures: Sequence[Architecture]) -> list[GridLayout]:
    return [
        resolve_layout(
            parallel, name="parallel", world_size=case.world, num_layers=architecture.num_layers,
            divisible=tp_divisible(architecture, case.pad_heads),
        )
        for parallel, architecture in zip(case.parallel, architectures, strict=True)
    ]  # fmt: skip


def storages(tensors: Iterator[torch.Tensor]) -> dict[int, int]:
    """{address: bytes} of what these tensors keep alive, each storage once."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


@contextlib.contextmanager
def saved_by_autograd(parameters: set[int]) -> Iterator[list[int]]:
    """Yields [bytes alive, most bytes alive] of what autograd saves inside, each storage once; parameters left out."""
    users: dict[int, int] = {}
    bytes_alive = [0, 0]

    def drop(place: int, size: int) -> None:
        users[place] -= 1
        bytes_alive[0] -= size if users[place] == 0 else 0

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    def pack(tensor: torch.Tensor) -> Kept:
        kept, storage = Kept(tensor), tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in parameters:
            bytes_alive[0] += size if users.get(place, 0) == 0 else 0
            bytes_alive[1] = max(bytes_alive)
            users[place] = users.get(place, 0) + 1
            weakref.finalize(kept, drop, place, size)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        yield bytes_alive


def optimizer_tensors(optimizer: StudentOptimizer) -> Iterator[torch.Tensor]:
    """Moments and what the optimizer updates: the model's own fp32 parameters, or master copies."""
    for part in getattr(optimizer.optimizer, "chained_optimizers", [optimizer.optimizer]):
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for name, value in state.items() if name != "step")


def held(folder: Path, case: Case) -> Held:
    """On a rank: build both models, do one step, and count."""
    platform = select_platform("cpu")
    architectures = [read_architecture(folder / name) for name in ("teacher", "student")]
    models = []
    for number, layout in enumerate(layouts(case, architectures)):
        with platform.scope():
            grid = build_grid(layout)
            init_mcore_globals(0, grid.coords.tp if grid.is_member else 0)
        models.append(
            build_model(
                architectures[number], grid, platform, dtype=DTYPES[case.dtype], hf_dir=folder / ("teacher", "student")[number],
                frozen=number == 0, vocab_size=TEACHER_VOCAB, recompute=case.recompute if number else None,
            )
        )  # fmt: skip
    alignment = Alignment(*models, case.distill, platform, micro_batch_size=1)
    optimizer = None
    if models[1].grid.is_member:
        config = OptimizerConfig(distributed=case.distributed)
        optimizer = build_optimizer(models[1], config, 10, platform, case.trains_head)
        optimizer.zero_grad()
    weights = [storages(p for chunk in model.chunks for p in chunk.parameters()) for model in models]
    with saved_by_autograd(set(weights[1])) as activations:
        chunks = optimizer.chunks if optimizer else None
        plan = alignment.plan(samples())
        alignment.run(plan, train=True, chunks=chunks)
    sizes = [chunk.route.held_bytes(alignment.wire.state_bytes).get(dist.get_rank(), 0) for chunk in plan.chunks]
    gradients, state = 0, {}
    if optimizer is not None:
        optimizer.step()
        gradients = sum(buffer.grad_data.nbytes for chunk in optimizer.chunks for buffer in chunk.buffers)
        state = storages(optimizer_tensors(optimizer))
    return Held(
        teacher_weights=sum(weights[0].values()),
        weights=sum(weights[1].values()),
        gradients=gradients,
        optimizer=sum(size for place, size in state.items() if place not in weights[1]),
        activations=activations[1],
        spool=alignment.peak_bytes,
        spool_planned=peak_spooled(sizes, None, *(model.grid.is_member for model in models)),
    )


@pytest.fixture(params=CASES)
def measured(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Case, list[Held], list[ModelMemory]]:
    """A case, what its ranks held, and the formulas for teacher and student."""
    case = CASES[request.param]
    shape: dict[str, Any] = dict(hidden_size=80, ffn=176, heads=4, kv_heads=2, std=0.1, tied=case.tied)
    tiny_hf_model(case.family, tmp_path / "teacher", num_layers=7, vocab_size=TEACHER_VOCAB, seed=1, **shape)  # type: ignore[arg-type]
    tiny_hf_model(case.family, tmp_path / "student", num_layers=6, vocab_size=STUDENT_VOCAB, seed=2, **shape)  # type: ignore[arg-type]
    if case.student.layers_per_stage:
        case = Case(**{**vars(case), "teacher": case.student.model_copy(update={"layers_per_stage": None})})
    architectures = [read_architecture(tmp_path / name) for name in ("teacher", "student")]
    grids = layouts(case, architectures)
    maps = {layer: 80 * 80 for layer in (1, 2, 5)} if case.distill == LINEAR else {}
    formulas = [
        ModelMemory(architectures[0], grids[0], case.dtype, TEACHER_VOCAB, trained=False),
        ModelMemory(
            architectures[1], grids[1], case.dtype, TEACHER_VOCAB, True, case.distributed, case.recompute,
            case.trains_head, maps,
        ),
    ]  # fmt: skip
    return case, run_ranks(case.world, held, tmp_path, case), formulas


def test_a_rank_holds_what_is_estimated(measured: tuple[Case, list[Held], list[ModelMemory]]) -> None:
    """Weights, gradients and optimizer to the byte, the distributed optimizer's padding aside; activations within a factor."""
    case, ranks, (teacher, student) = measured
    micro_batches = len(samples()) // student.layout.dp
    expected = student.stages(tokens=LONGEST, micro_batches=micro_batches)
    expected_teacher = teacher.stages(tokens=LONGEST, micro_batches=len(samples()) // teacher.layout.dp)
    for rank, found in enumerate(ranks):
        if rank in teacher.layout.ranks:
            assert found.teacher_weights == expected_teacher[teacher.layout.coords(rank).pp].weights
        if rank not in student.layout.ranks:
            assert found.weights == found.gradients == found.optimizer == found.activations == 0
            continue
        estimate = expected[student.layout.coords(rank).pp]
        assert (found.weights, found.gradients) == (estimate.weights, estimate.gradients)
        if not case.distributed:
            assert found.optimizer == estimate.optimizer
        stage = student.layout.coords(rank).pp
        local = LocalMemory(**vars(student)).activations(stage, LONGEST, micro_batches)
        low, high = LOCAL_RATIO
        assert low < found.activations / local < high
        times = TIMES_ESTIMATE_SANDWICH if student.architecture.sandwich_norm else TIMES_ESTIMATE
        assert 1 < found.activations / estimate.activations < times
    if case.distributed:
        check_shares(case, ranks, student)


def check_shares(case: Case, ranks: list[Held], student: ModelMemory) -> None:
    """Data- and context-parallel ranks together hold the state of every trained number once; none more than estimated."""
    layout = student.layout
    per_number = 12 if case.dtype == "bf16" else 8
    for tp, stage in itertools.product(range(layout.tp), range(layout.pp)):
        group = [ranks[r].optimizer for r in layout.ranks if (layout.coords(r).tp, layout.coords(r).pp) == (tp, stage)]
        numbers = sum(
            size
            for chunk in range(layout.vpp)
            for name, size in student.chunk_parameters(stage, chunk).items()
            if case.tied or case.trains_head or name != "output_layer.weight"
        )
        assert sum(group) == numbers * per_number
        (estimate,) = {student.stages(LONGEST, 4)[stage].optimizer}
        padding = estimate * len(group) - numbers * per_number
        assert max(group) <= estimate <= max(group) + padding


@pytest.mark.parametrize("case", ["pp2_tied", "disjoint"])
def test_spool_is_the_plans(tmp_path: Path, case: str) -> None:
    """peak_spooled of the plan's sizes is what ranks of shared and of disjoint grids hold at most."""
    for name, layers, seed in (("teacher", 7, 1), ("student", 6, 2)):
        tiny_hf_model("llama", tmp_path / name, num_layers=layers, vocab_size=STUDENT_VOCAB, seed=seed, std=0.1)
    for rank in run_ranks(CASES[case].world, held, tmp_path, CASES[case]):
        assert rank.spool == rank.spool_planned > 0


def test_spool_by_hand() -> None:
    """One chunk at a time with both models; a teacher alone keeps what it sent, a student alone looks ahead, in the budget."""
    sizes = [3, 5, 2, 4]
    assert peak_spooled(sizes, None, True, True) == 5
    assert peak_spooled(sizes, None, True, False) == peak_spooled(sizes, None, False, True) == 14
    assert peak_spooled(sizes, 8, True, False) == peak_spooled(sizes, 8, False, True) == 8
    assert peak_spooled(sizes, 7, True, False) == 7
    assert peak_spooled(sizes, 6, False, True) == 6
    assert peak_spooled([], None, True, True) == 0


@pytest.mark.parametrize(
    ("pp", "stage", "micro_batches", "kept", "peak"),
    [
        (1, 0, 8, [1], 1),
        (4, 0, 8, [1], 4),
        (4, 3, 8, [1], 1),
        (4, 0, 2, [1], 2),
        (2, 0, 4, [1, 1], 5),  # 2 * (2 - 0 - 1) + (2 - 1) * 2 forwards before the first backward, and the one before it
        (2, 1, 4, [1, 1], 3),
        (4, 0, 4, [1, 1], 8),  # all of them are forwarded first
        (2, 1, 4, [1, 10], 12),  # forward 0 0 1, then one back for each forward: never two of chunk 1
    ],
)
def test_in_flight(pp: int, stage: int, micro_batches: int, kept: list[int], peak: int) -> None:
    """1F1B and the interleaved schedule, counted by hand."""
    assert peak_in_flight(kept, pp, stage, micro_batches) == peak


def test_a_known_model(tmp_path: Path) -> None:
    """Qwen2.5-7B: 7,615,616,512 parameters on one rank, 72B: 72,706,203,648; an engine holds them unpadded."""
    for config, number in ((QWEN_7B, 7_615_616_512), (QWEN_72B, 72_706_203_648)):
        architecture = read_architecture(write_config(tmp_path, config))
        layout = GridLayout(1, 1, 1, False, (architecture.num_layers,))
        memory = ModelMemory(architecture, layout, "bf16", 0, trained=True)
        (stage,) = memory.stages(tokens=1, micro_batches=1)
        assert stage.parameters == number
        trained = number - 152064 * architecture.hidden_size
        assert (stage.weights, stage.gradients, stage.optimizer) == (2 * number, 4 * trained, 12 * trained)
        assert engine_bytes(architecture, "bf16") == 2 * number
