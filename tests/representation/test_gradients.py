"""Sharded equals reference: Eq. 6 in value and every gradient element, against Hugging Face in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from checkpoints_conversion import mappings_for, read_architecture
from checkpoints_conversion.live.weights import canonical_parameters
from oprd_megatron.config.schema import DistillConfig, OptimizerConfig, ParallelConfig
from oprd_megatron.models import build_model
from oprd_megatron.optimizer import build_optimizer
from oprd_megatron.parallel import resolve_layout, tp_divisible
from oprd_megatron.parallel.grid import build_grid, init_mcore_globals
from oprd_megatron.platform import select_platform
from oprd_megatron.representation.alignment import Alignment
from oprd_megatron.representation.batch import Sample
from oprd_megatron.representation.layer_map import resolve_layer_pairs
from oprd_megatron.representation.positions import supervised_positions
from tests.ranks import run_ranks
from tests.tiny_models import as_in_files, tiny_hf_model

VOCAB = 300
LAYOUTS = {
    "single": ParallelConfig(),
    "tp2": ParallelConfig(tp=2),
    "tp2sp": ParallelConfig(tp=2, sp=True),
    "pp2": ParallelConfig(pp=2),
    "tp2pp2": ParallelConfig(tp=2, pp=2),
    "dp2": ParallelConfig(dp=2),
    "tp2pp2sp": ParallelConfig(tp=2, pp=2, sp=True),
    "tp2dp2": ParallelConfig(tp=2, dp=2),
    "pp2dp2": ParallelConfig(pp=2, dp=2),
}
CONFIGS = {
    "vanilla": DistillConfig(),
    "l2_last_k": DistillConfig(normalize="l2", positions="last_k", k=3, coefficient=100.0),
    "predictor_pre_norm_odd": DistillConfig(
        layers="odd", positions="first_k", k=4, position_anchor="predictor", final_state="pre_norm"
    ),
    "crossing_pairs": DistillConfig(layer_map={1: 5, 2: 5, 4: 1}, positions="last"),
}
RELATIVE = 1e-5
"""Of the largest gradient element: fp32 sums in another order, nothing else."""
ZERO = 1e-9
"""What is left where a gradient is zero: of the router of normalised top-1 routing, in transformers."""


def samples() -> list[Sample]:
    """Ragged prompts and responses; sample 4 has none, so that one micro-batch supervises nothing."""
    generator = torch.Generator().manual_seed(3)
    lengths = [(5, 7), (3, 1), (8, 12), (2, 4), (6, 0), (7, 0), (4, 9), (1, 6)]
    draw = lambda n: tuple(torch.randint(0, VOCAB, (n,), generator=generator).tolist())  # noqa: E731
    return [Sample(draw(prompt), draw(response)) for prompt, response in lengths]


def build(
    teacher_dir: Path,
    student_dir: Path,
    parallel: ParallelConfig,
    distill: DistillConfig,
    micro_batch: int,
    teacher_parallel: ParallelConfig | None = None,
) -> Alignment:
    """Teacher and student on this rank; `teacher_parallel` where the teacher's layout is another than the student's."""
    platform = select_platform("cpu")
    models = []
    layouts = (teacher_parallel or parallel, parallel)
    for hf_dir, frozen, parallel in zip((teacher_dir, student_dir), (True, False), layouts, strict=True):
        architecture = read_architecture(hf_dir)
        layout = resolve_layout(
            parallel, name="parallel", world_size=dist.get_world_size(), num_layers=architecture.num_layers,
            divisible=tp_divisible(architecture, pad_heads=False),
        )  # fmt: skip
        with platform.scope():
            grid = build_grid(layout)
            init_mcore_globals(0, grid.coords.tp)
        models.append(build_model(architecture, grid, platform, dtype=torch.float32, hf_dir=hf_dir, frozen=frozen))
    return Alignment(*models, distill, platform, micro_batch)


def sharded_gradients(
    teacher_dir: Path,
    student_dir: Path,
    parallel: ParallelConfig,
    distill: DistillConfig,
    teacher_parallel: ParallelConfig | None = None,
) -> dict:
    """This rank's report and {canonical name: gradient shard} after one batch of 2-sample micro-batches."""
    alignment = build(teacher_dir, student_dir, parallel, distill, 2, teacher_parallel)
    optimizer = build_optimizer(alignment.student, OptimizerConfig(), 10, alignment.platform)
    plan = alignment.plan(samples())
    optimizer.zero_grad()
    report = alignment.reduce(alignment.run(plan, chunks=optimizer.chunks, train=True))
    with alignment.platform.scope():
        optimizer.optimizer.prepare_grads()
        norm = float(optimizer.optimizer.get_grad_norm())
    gradients = {name: p.main_grad.clone() for name, p in canonical_parameters(alignment.student.chunks).items()
                 if p.requires_grad}  # fmt: skip
    student = alignment.student
    return {
        "report": report,
        "norm": norm,
        "gradients": gradients,
        "coords": student.grid.coords,
        "sharding": student.sharding,
    }


def reference(teacher_dir: Path, student_dir: Path, distill: DistillConfig) -> tuple[float, dict[str, torch.Tensor]]:
    """Eq. 6 written out, one sample at a time, on transformers' models: (loss, {HF name: gradient})."""
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (teacher_dir, student_dir)
    )
    depths = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    pairs = resolve_layer_pairs(distill, *depths)
    pre_norm = {}
    for model in (teacher, student):
        model.model.norm.register_forward_pre_hook(lambda _, inputs, model=model: pre_norm.update({model: inputs[0]}))
    total, count = torch.zeros(()), 0
    for sample in samples():
        positions = list(supervised_positions(len(sample.prompt_ids), len(sample.response_ids), distill))
        if not positions:
            continue
        count += len(positions)
        ids = torch.tensor([sample.ids])
        states = []
        for model in (teacher, student):
            output = list(model(ids, output_hidden_states=True).hidden_states[1:])
            if distill.final_state == "pre_norm":
                output[-1] = pre_norm[model]
            states.append(output)
        for pair in pairs:
            h_t = states[0][pair.teacher_layer - 1][0, positions].detach()
            h_s = states[1][pair.student_layer - 1][0, positions]
            if distill.normalization == "l2":
                h_t, h_s = (torch.nn.functional.normalize(h, dim=-1) for h in (h_t, h_s))
            total = total + (h_s - h_t).square().mean(-1).sum() / len(pairs)
    loss = distill.coefficient * total / count
    loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return loss.item(), as_in_files(student, gradients)


def assembled(ranks: list[dict], student_dir: Path) -> dict[str, torch.Tensor]:
    """Whole gradients under HF names, from the shards of data-parallel rank 0; replicas must agree."""
    whole: dict[str, torch.Tensor] = {}
    for name, mapping in mappings_for(read_architecture(student_dir)).items():
        holders = [rank for rank in ranks if name in rank["gradients"] and rank["coords"].dp == 0]
        for stage in sorted({rank["coords"].pp for rank in holders}):
            shards = [rank["gradients"][name] for rank in holders if rank["coords"].pp == stage]
            sharding = next(rank["sharding"] for rank in holders)
            if not mapping.exported:
                continue
            if name.endswith("norm.weight"):
                for shard in shards:
                    torch.testing.assert_close(shard, shards[0], rtol=0, atol=1e-7)
            whole.update(mapping.to_hf(shards, sharding))
    return whole


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", CONFIGS)
def test_value_and_gradients_equal_reference(tmp_path: Path, layout: str, config: str) -> None:
    """Loss to 1e-6 and every gradient element to 1e-5 of the largest, in fp32, in every layout."""
    check(tmp_path, LAYOUTS[layout], CONFIGS[config], "llama", tied=True)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "phi3", "gemma3_text"])
@pytest.mark.parametrize("layout", ["tp2", "tp2pp2sp"])
def test_families_equal_reference(tmp_path: Path, layout: str, family: str) -> None:
    """Biases, per-head norms and norms of outputs get their whole gradient too; the untied head gets none."""
    check(tmp_path, LAYOUTS[layout], CONFIGS["vanilla"], family, tied=False)


def test_scaled_tied_embedding_equals_reference(tmp_path: Path) -> None:
    """Gemma's embedding gets its gradient through the scale, also where the head is a second copy of it."""
    check(tmp_path, LAYOUTS["tp2pp2sp"], CONFIGS["vanilla"], "gemma3_text", tied=True)


@pytest.mark.parametrize(
    ("family", "routing"),
    [
        ("qwen3_moe", {"normalised": True}),
        ("qwen3_moe", {"normalised": False}),
        ("mixtral", {"top_k": 1}),
        ("mixtral", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["single", "tp2sp", "tp2pp2sp", "dp2", "pp2"])
def test_experts_equal_reference(tmp_path: Path, layout: str, family: str, routing: dict[str, Any]) -> None:
    """Every expert's and every router's gradient is whole, once: each tensor-parallel rank routes tokens of its own."""
    check(tmp_path, LAYOUTS[layout], CONFIGS["vanilla"], family, tied=False, **routing)


UNEQUAL = {
    "tp2_to_pp2": (ParallelConfig(tp=2), ParallelConfig(pp=2)),
    "pp2_to_tp2": (ParallelConfig(pp=2, layers_per_stage=[4, 1]), ParallelConfig(tp=2)),
    "tp2sp_to_dp2": (ParallelConfig(tp=2, sp=True), ParallelConfig(dp=2)),
    "dp2_to_tp2sp": (ParallelConfig(dp=2), ParallelConfig(tp=2, sp=True)),
    "tp2pp2_to_tp2dp2": (ParallelConfig(tp=2, pp=2), ParallelConfig(tp=2, dp=2)),
    "pp4_to_tp2sp_pp2": (ParallelConfig(pp=4), ParallelConfig(tp=2, pp=2, sp=True)),
    "dp4_to_pp2tp2": (ParallelConfig(dp=4), ParallelConfig(pp=2, tp=2)),
}


@pytest.mark.parametrize("layouts", UNEQUAL)
def test_a_teacher_in_another_layout(tmp_path: Path, layouts: str) -> None:
    """The interface does not assume equal layouts: value and gradients are the reference's whatever grid the teacher has."""
    teacher, student = UNEQUAL[layouts]
    check(tmp_path, student, CONFIGS["crossing_pairs"], "llama", tied=True, teacher_parallel=teacher)
    check(tmp_path, student, CONFIGS["vanilla"], "llama", tied=True, teacher_parallel=teacher)


def check(
    tmp_path: Path,
    parallel: ParallelConfig,
    distill: DistillConfig,
    family: str,
    tied: bool,
    teacher_parallel: ParallelConfig | None = None,
    **routing: Any,
) -> None:
    """`routing`: see `tiny_config`."""
    teacher_dir, student_dir = tmp_path / "teacher", tmp_path / "student"
    tiny_hf_model(family, teacher_dir, num_layers=5, vocab_size=VOCAB, std=0.1, seed=1, tied=tied, **routing)
    tiny_hf_model(family, student_dir, num_layers=4, vocab_size=VOCAB, std=0.1, seed=2, tied=tied, **routing)
    loss, expected = reference(teacher_dir, student_dir, distill)
    world = parallel.tp * parallel.pp * (parallel.dp or 1)
    norm = torch.cat([gradient.flatten() for gradient in expected.values()]).norm().item()
    ranks = run_ranks(world, sharded_gradients, teacher_dir, student_dir, parallel, distill, teacher_parallel)
    for rank in ranks:
        assert rank["report"].loss == pytest.approx(loss, rel=1e-6)
        assert rank["norm"] == pytest.approx(norm, rel=1e-5)
    found = assembled(ranks, student_dir)
    assert "lm_head.weight" not in expected
    for name, gradient in expected.items():
        limit = RELATIVE * gradient.abs().max().item() + ZERO
        difference = (found[name] - gradient).abs().max().item()
        assert difference <= limit, f"{name}: {difference} > {limit}"
    for name in set(found) - set(expected):
        assert not found[name].any(), f"{name} is not part of the loss, but has a gradient"
