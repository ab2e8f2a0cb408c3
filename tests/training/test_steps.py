"""Training steps: what one computes, what it must not compute, and how it stops."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from oprd_megatron.config import parse_config
from oprd_megatron.config.schema import DistillConfig, ParallelConfig
from oprd_megatron.errors import TrainingDiverged, UserError
from oprd_megatron.models import Model
from oprd_megatron.optimizer import StudentOptimizer
from oprd_megatron.placing import build_models
from oprd_megatron.platform import select_platform
from oprd_megatron.preflight import preflight
from oprd_megatron.trainer import Trainer
from tests.ranks import run_ranks
from tests.representation.test_gradients import LAYOUTS, VOCAB, build, samples, sharded_gradients
from tests.tiny_models import tiny_hf_model
from tests.training.runs import changed, student_tensors, train_on_rank, train_records, train_run, with_layout
from tests.training.test_resume import in_one_part, in_two_parts

WIDTH, FFN = 32, 96
"""No tensor of these models but logits is as wide as a shard of the padded vocabulary (384 or 256)."""


def make_trainer(values: dict[str, Any]) -> Trainer:
    """A trainer on this rank whose engine has the student's weights, as the loop makes it."""
    config = parse_config(values, "test")
    platform = select_platform("cpu")
    checked = preflight(config, dist.get_world_size())
    trainer = Trainer(checked, *build_models(checked, platform), platform)
    trainer.sync(0)
    return trainer


class NoLogits(TorchDispatchMode):
    """Refuses every operation that makes a matrix as wide as this rank's shard of the vocabulary."""

    def __init__(self, widths: set[int]) -> None:
        super().__init__()
        self.widths = widths

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim > 1 and tensor.size(-1) in self.widths:
                raise AssertionError(f"{func} made logits {list(tensor.shape)}")
        return output


@contextlib.contextmanager
def heads_forbidden(*models: Model) -> Iterator[None]:
    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("an LM head was called")

    for model in models:
        if model.grid.is_last_stage:
            model.chunks[-1].output_layer.forward = forbidden
    with NoLogits({model.sharding.vocab_size_padded // model.grid.layout.tp for model in models}):
        yield


def one_step_without_heads(teacher_dir: Path, student_dir: Path, parallel: ParallelConfig) -> float:
    alignment = build(teacher_dir, student_dir, parallel, DistillConfig(), micro_batch=2)
    with heads_forbidden(alignment.teacher, alignment.student):
        report = alignment.reduce(alignment.run(alignment.plan(samples()), train=True))
    trained = [parameter for parameter in alignment.student.chunks[0].parameters() if parameter.grad is not None]
    assert any(parameter.grad.any() for parameter in trained), "no gradient reached this rank"
    return report.loss


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", ["single", "pp2", "tp2"])
def test_no_head_and_no_logits(tmp_path: Path, layout: str, tied: bool) -> None:
    """Eq. 6 reads hidden states only: neither model's head is called, and no [.., V] matrix exists on any rank."""
    for name, layers in (("teacher", 5), ("student", 4)):
        tiny_hf_model(
            "llama",
            tmp_path / name,
            num_layers=layers,
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            ffn=FFN,
            tied=tied,
            std=0.1,
        )
    parallel = LAYOUTS[layout]
    losses = run_ranks(
        parallel.tp * parallel.pp, one_step_without_heads, tmp_path / "teacher", tmp_path / "student", parallel
    )
    assert losses[0] > 0


@pytest.mark.parametrize("normalize", ["none", "l2"])
@pytest.mark.parametrize("layout", ["single", "tp2", "tp2sp", "pp2", "tp2pp2", "dp2"])
def test_a_teacher_of_itself(tmp_path: Path, layout: str, normalize: str) -> None:
    """Student == teacher: loss 0, cosine 1 and a zero gradient on every rank."""
    tiny_hf_model("llama", tmp_path, vocab_size=VOCAB, std=0.1)
    parallel, distill = LAYOUTS[layout], DistillConfig(normalize=normalize)
    world = parallel.tp * parallel.pp * (parallel.dp or 1)
    for rank in run_ranks(world, sharded_gradients, tmp_path, tmp_path, parallel, distill):
        assert rank["report"].loss <= 1e-10
        assert rank["report"].cosine == pytest.approx([1.0] * 4, abs=1e-6)
        for name, gradient in rank["gradients"].items():
            assert gradient.abs().max().item() <= 1e-7, name


def step_zero_responses(values: dict[str, Any]) -> list[tuple[int, ...]]:
    return [rollout.response_ids for rollout in make_trainer(values).text.rollouts(0)]


def test_rollouts_do_not_depend_on_the_layout(values: dict[str, Any]) -> None:
    """In fp32 the students of all layouts write the same responses, and every rank holds all of them."""
    expected = run_ranks(1, step_zero_responses, values)[0]
    assert len(expected) == 8 and len(set(expected)) > 1
    for layout in ({"tp": 2}, {"pp": 2}, {"dp": 2}):
        for responses in run_ranks(2, step_zero_responses, with_layout(values, **layout)):
            assert responses == expected, layout


def test_micro_batch_size_does_not_change_the_update(tmp_path: Path, values: dict[str, Any]) -> None:
    """1, 2 and 4 rollouts a pass give the same student after two steps, to 1e-6: one global denominator."""
    students = []
    for size in (1, 2, 4):
        run = {"dir": str(tmp_path / f"micro_{size}"), "steps": 2, "micro_batch_size": size}
        students.append(student_tensors(train_run({**changed(values, run=run), "eval": None})))
    for student in students[1:]:
        for name, tensor in students[0].items():
            assert (tensor - student[name]).abs().max().item() <= 1e-6, name


def in_bf16(values: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    return changed(values, teacher={"dtype": "bf16"}, student={"dtype": "bf16"}, **sections)


def bf16_step(values: dict[str, Any]) -> dict[str, float]:
    """One step with a learning rate below bf16's resolution: the shares of weights and master weights that moved."""
    trainer = make_trainer(values)
    weights = [parameter for parameter in trainer.student.chunks[0].parameters() if parameter.requires_grad]
    masters = [p for group in trainer.optimizer.optimizer.param_groups for p in group["params"]]
    assert {p.dtype for p in weights} == {torch.bfloat16}
    assert {p.dtype for p in masters} == {torch.float32}
    before = [torch.cat([p.detach().flatten().clone() for p in group]) for group in (weights, masters)]
    trainer.step(0)
    after = [torch.cat([p.detach().flatten() for p in group]) for group in (weights, masters)]
    moved = [(new != old).float().mean().item() for old, new in zip(before, after, strict=True)]
    return dict(zip(("weights", "masters"), moved, strict=True))


@pytest.mark.parametrize("distributed", [False, True], ids=["replicated", "distributed"])
@pytest.mark.parametrize("layout", [{"dp": 2}, {"tp": 2}], ids=str)
def test_bf16_has_fp32_master_weights(values: dict[str, Any], layout: dict[str, int], distributed: bool) -> None:
    """An update far below bf16's resolution is lost by most bf16 weights and kept by the master weights."""
    optimizer = {"lr": 1e-6, "warmup_fraction": 0.0, "eps": 1e-12, "distributed": distributed}
    for rank in run_ranks(2, bf16_step, with_layout(in_bf16(values, optimizer=optimizer), **layout)):
        assert rank["masters"] > 0.5
        assert rank["weights"] < 0.05


@pytest.mark.parametrize("distributed", [False, True], ids=["replicated", "distributed"])
@pytest.mark.parametrize("layout", [{"dp": 2}, {"pp": 2}], ids=str)
def test_bf16_resumes_bit_for_bit(
    tmp_path: Path, values: dict[str, Any], layout: dict[str, int], distributed: bool
) -> None:
    """Three and three steps are six, also where updates live in the master weights only."""
    values = {**in_bf16(values, optimizer={"distributed": distributed, "lr": 1e-4}), "eval": None}
    whole = student_tensors(in_one_part(values, layout, tmp_path / "whole"))
    parts = student_tensors(in_two_parts(values, layout, layout, tmp_path / "parts"))
    assert {tensor.dtype for tensor in whole.values()} == {torch.bfloat16}
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


def poisoned_run(values: dict[str, Any], where: str) -> str:
    """Train, with a NaN put into layer 3 before step 3: into its weights, or into their gradient. Returns the error."""
    take_step = Trainer.step
    take_optimizer_step = StudentOptimizer.step

    def layer_three(chunk: torch.nn.Module) -> list[torch.nn.Parameter]:
        return [block.mlp.linear_fc2.weight for block in chunk.decoder.layers if block.layer_number == 3]

    def step(self: Trainer, step: int) -> dict[str, Any]:
        for weight in layer_three(self.student.chunks[0]) if step == 2 and where == "weight" else ():
            weight.data[0, 0] = torch.nan
        return take_step(self, step)

    def optimizer_step(self: StudentOptimizer) -> float:
        if where == "gradient" and self.scheduler.num_steps == 2:
            for weight in layer_three(self.chunks[0].module):
                weight.main_grad[0, 0] = torch.nan
        return take_optimizer_step(self)

    Trainer.step, StudentOptimizer.step = step, optimizer_step
    with pytest.raises(TrainingDiverged) as caught:
        train_on_rank(values)
    return str(caught.value)


@pytest.mark.parametrize(("layout", "rank"), [({}, 0), ({"pp": 2}, 1)], ids=["single", "pp2"])
@pytest.mark.parametrize(("where", "what"), [("weight", "loss"), ("gradient", "gradient")])
def test_nan_stops_the_run(values: dict[str, Any], layout: dict[str, int], rank: int, where: str, what: str) -> None:
    """Every rank stops at the same step with one line that names step, rank and layer; the checkpoint of the last good
    step stays, and the run goes on from it."""
    values = with_layout(changed(values, run={"steps": 4}), **layout)
    values = {**values, "checkpoint": {"every": 1}, "eval": None}
    errors = run_ranks(max(1, layout.get("pp", 1)), poisoned_run, values, where)
    assert len(set(errors)) == 1 and "\n" not in errors[0]
    assert f"step 3: the {what} is not finite (rank {rank}, student layer 3" in errors[0]
    folder = Path(values["run"]["dir"]) / "checkpoints"
    assert sorted(path.name for path in folder.glob("iter_*")) == ["iter_0000001", "iter_0000002"]
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "2"
    train_run(values)
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "4"


def diverging_run(values: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        train_on_rank(values)
    return str(caught.value)


def test_a_nan_in_the_student_directory_stops_the_run(values: dict[str, Any]) -> None:
    """A student that is broken from the start never takes a step, and says so."""
    model = tiny_hf_model("llama", values["student"]["path"], std=0.1, seed=2)
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(values["student"]["path"])
    (error,) = run_ranks(1, diverging_run, {**values, "eval": None})
    assert "not finite" in error and "\n" not in error
    assert not (Path(values["run"]["dir"]) / "checkpoints").exists()


@pytest.mark.parametrize(
    ("teacher", "student", "sections"),
    [
        ({"tp": 2}, {"pp": 2}, {}),
        ({"pp": 2}, {"dp": 2}, {}),
        ({"dp": 2}, {"tp": 2, "sp": True}, {"run": {"micro_batch_tokens": 40}}),
        ({"cp": 2}, {"pp": 2, "vpp": 2}, {"distill": {"spool_bytes": "16KiB"}}),
        (
            {"pp": 2, "layers_per_stage": "follow_student"},
            {"cp": 2},
            {"student": {"recompute": {"granularity": "full"}}},
        ),
        ({"tp": 2, "ranks": "0-1"}, {"dp": 2, "ranks": "2-3"}, {"optimizer": {"distributed": True}}),
    ],
    ids=str,
)
def test_a_run_with_a_teacher_in_another_layout(
    tmp_path: Path,
    values: dict[str, Any],
    teacher: dict[str, Any],
    student: dict[str, Any],
    sections: dict[str, dict[str, Any]],
) -> None:
    """Three steps with unequal layouts end with the student of one process, and measure the same held-out KL."""
    values = {**values, "distill": {}}
    whole = train_run(changed(values, run={"dir": str(tmp_path / "whole")}))
    unequal = changed(with_layout(values, teacher, student), run={"dir": str(tmp_path / "unequal")})
    train_run(changed(unequal, **sections))
    for name, tensor in student_tensors(whole).items():
        assert (tensor - student_tensors(tmp_path / "unequal")[name]).abs().max().item() <= 1e-5, name
    found, expected = ([record["kl"] for record in train_records(run, "eval")] for run in (tmp_path / "unequal", whole))
    assert found == pytest.approx(expected, rel=1e-4)


def test_an_fp8_wire_says_what_it_lost(tmp_path: Path, values: dict[str, Any]) -> None:
    """The run trains, its loss is near the exact wire's, and every step's record has the measured rounding error."""
    losses = {}
    for wire in ("fp32", "fp8"):
        run = train_run({**changed(values, run={"dir": str(tmp_path / wire)}), "distill": {"wire": wire}, "eval": None})
        records = train_records(run)
        losses[wire] = records[0]["loss"]
        assert all(("wire_error" in record) == (wire == "fp8") for record in records)
    assert all(0.005 < record["wire_error"] < 0.04 for record in records)
    assert losses["fp8"] == pytest.approx(losses["fp32"], rel=0.05) and losses["fp8"] != losses["fp32"]
