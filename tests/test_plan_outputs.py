"""`oprd plan` of runs with output terms, against what such a run sends and holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist

from checkpoints_conversion import read_architecture
from oprd_megatron.config import parse_config
from oprd_megatron.config.output import OutputConfig, reads_few
from oprd_megatron.lesson import plan_shares
from oprd_megatron.objectives.fused_terms import TeacherHead, TeacherSummary, output_terms, summarize
from oprd_megatron.parallel.layout import GridLayout
from oprd_megatron.parallel.memory import ModelMemory
from oprd_megatron.planning import RunPlan, plan_run, plan_text
from oprd_megatron.planning.output_memory import OutputMemory, OutputPlan
from oprd_megatron.planning.text import size
from oprd_megatron.representation import grids
from oprd_megatron.representation.wire import Wire
from oprd_megatron.trainer import Phases
from tests.live_bytes import LiveBytes
from tests.parallel.test_memory import optimizer_tensors, storages
from tests.qwen_configs import write_config
from tests.ranks import run_ranks
from tests.test_plan import SMALL, row
from tests.tiny_models import tiny_hf_model
from tests.training.runs import changed, num_ranks, tiny_run
from tests.training.test_steps import make_trainer

FULL: dict[str, Any] = {"kind": "full"}
LAST: dict[str, Any] = {"kind": "sampled", "positions": "last_k", "first_or_last": 5}
OF_TEACHER: dict[str, Any] = {"kind": "topk", "k": 4, "support": "teacher"}
NO_STATES: dict[str, Any] = {"mode": "none"}
CASES: dict[str, dict[str, Any]] = {
    "states_and_final_states": {
        "teacher": {"tp": 2}, "student": {"pp": 2}, "terms": [FULL], "distill": {"positions": "last_k", "k": 3},
    },
    "columns": {
        "teacher": {"pp": 2}, "student": {"tp": 2}, "terms": [LAST, OF_TEACHER], "distill": NO_STATES, "wide": True,
    },
    "final_states_are_fewer_tokens": {
        "teacher": {"pp": 2}, "student": {"tp": 2, "sp": True}, "terms": [LAST], "distill": NO_STATES, "wide": True,
        "teacher_head": "student",
    },
    "disjoint": {
        "teacher": {"pp": 2, "ranks": "0-1"}, "student": {"tp": 2, "ranks": "2-3"}, "terms": [FULL, LAST], "distill": {},
    },
    "alike": {"teacher": {"tp": 2}, "student": {"tp": 2}, "terms": [LAST], "distill": NO_STATES},
    "trained_maps": {
        "teacher": {"pp": 2}, "student": {"pp": 2}, "terms": [FULL], "distill": {"mode": "linear", "layers": [1, 2, 4]},
        "wide": True,
    },
}  # fmt: skip


def run_of(folder: Path, case: str) -> dict[str, Any]:
    """A run of untied tiny models; every prompt is shorter than what is planned for."""
    how = CASES[case]
    values = tiny_run(folder)
    for name, layers in (("teacher", 5), ("student", 4)):
        wide = {"hidden_size": 48} if how.get("wide") and name == "teacher" else {}
        tiny_hf_model("llama", folder / name, num_layers=layers, tied=False, std=0.1, **wide)  # type: ignore[arg-type]
    values = changed(values, teacher={"parallel": how["teacher"]}, student={"parallel": how["student"]})
    values["rollout"]["prompts"]["max_tokens"] = 80
    output = {"terms": how["terms"], "teacher_head": how.get("teacher_head", "auto")}
    return {**values, "distill": how["distill"], "output": output, "eval": None}


def one_step(values: dict[str, Any]) -> dict[str, Any]:
    """On a rank: a step on the batch that a plan is made for, and what was sent and is held."""
    trainer = make_trainer(values)
    assert trainer.output is not None
    shares = plan_shares(trainer.lessons, [grids.longest_samples(trainer.config)])
    plan = shares[0].plan
    trainer.forward_backward(0, shares, trainer.output.weights(0.0), Phases(trainer.platform))
    trainer.update()
    found = {
        "planned": trainer.alignment.planned_bytes(plan),
        "sent": trainer.alignment.sent_bytes,
        "peak": trainer.alignment.peak_bytes,
        "head": 0, "weights": 0, "gradients": 0, "optimizer": 0,
    }  # fmt: skip
    if trainer.output.head is not None and trainer.output.head is not trainer_head(trainer):
        found["head"] = trainer.output.head.nbytes
    if trainer.optimizer is not None:
        weights = storages(p for chunk in trainer.student.chunks for p in chunk.parameters())
        state = storages(optimizer_tensors(trainer.optimizer))
        found["weights"] = sum(weights.values())
        found["gradients"] = sum(b.grad_data.nbytes for chunk in trainer.optimizer.chunks for b in chunk.buffers)
        found["optimizer"] = sum(nbytes for place, nbytes in state.items() if place not in weights)
    return found


def trainer_head(trainer: Any) -> torch.Tensor | None:
    teacher = trainer.alignment.teacher
    return teacher.head_weight if teacher.grid.is_last_stage else None


@pytest.mark.parametrize("case", CASES)
def test_a_run_does_what_is_planned(tmp_path: Path, case: str) -> None:
    """Bytes sent in all and by the busiest rank, the spool, the teacher's head, and the student's weights, gradients and
    optimizer: to the byte."""
    values = run_of(tmp_path, case)
    config, world = parse_config(values, "test"), num_ranks(values)
    plan, ranks = plan_run(config, world, gpus_per_node=2), run_ranks(world, one_step, values)
    traffic, out = plan.traffic, plan.traffic.outputs
    assert out is not None
    sent = [rank["sent"] for rank in ranks]
    assert traffic.total_bytes == sum(sent) == ranks[0]["planned"] == sum(link[2] for link in traffic.links)
    assert (traffic.most_sent is None) == (max(sent) == 0)
    if traffic.most_sent is not None:
        assert traffic.most_sent == (sent.index(max(sent)), max(sent))
    states = sum(stage.moved_bytes for stage in traffic.stages)
    assert traffic.total_bytes == states + out.moved_bytes
    student, teacher = plan.student, plan.teacher
    for group in plan.ranks:
        members = [rank for rank in range(world) if stages_of(plan, rank) == (group.teacher_stage, group.student_stage)]
        assert group.spool == max(ranks[rank]["peak"] for rank in members)
    memory = OutputMemory(config.output, OutputPlan.of(config, teacher.layout, student.layout, teacher.architecture),
                          *formulas(plan), (0, 0))  # fmt: skip
    for rank, found in enumerate(ranks):
        assert found["head"] == memory.teacher_head(rank)
        stage = stages_of(plan, rank)[1]
        if stage is not None:
            expected = student.memory[stage]
            assert (found["weights"], found["gradients"]) == (expected.weights, expected.gradients)
            assert found["optimizer"] == expected.optimizer
    copies = case not in (
        "columns",
        "alike",
        "trained_maps",
    )  # of the teacher's head, which is at hand or not wanted there
    assert any(found["head"] for found in ranks) == copies
    check_text(case, plan)


def stages_of(plan: RunPlan, rank: int) -> tuple[int | None, int | None]:
    teacher, student = (
        layout.coords(rank).pp if rank in layout.ranks else None
        for layout in (plan.teacher.layout, plan.student.layout)
    )
    return teacher, student


def formulas(plan: RunPlan) -> tuple[ModelMemory, ModelMemory]:
    vocab_size = max(plan.teacher.architecture.vocab_size, plan.student.architecture.vocab_size)
    teacher, student = (
        ModelMemory(model.architecture, model.layout, model.dtype, vocab_size, trained=model is plan.student)
        for model in (plan.teacher, plan.student)
    )
    return teacher, student


def check_text(case: str, plan: RunPlan) -> None:
    """The row of outputs, what travels and who applies the head; no layer map where no states are compared."""
    text, out = plan_text(plan), plan.traffic.outputs
    assert out is not None and all(len(line) <= 100 for line in text.splitlines() if "/" not in line)
    flat = " ".join(text.split())
    width, token_bytes, tokens, head = {
        "states_and_final_states": (32, 128, 64, "student"),
        "columns": (9, 36, 64, "teacher"),
        "final_states_are_fewer_tokens": (48, 192, 40, "student"),
        "disjoint": (32, 128, 64, "student"),
        "alike": (32, 128, 40, "student"),
        "trained_maps": (48, 192, 64, "student"),
    }[case]
    assert (out.width, out.token_bytes, out.tokens, out.head) == (width, token_bytes, tokens, head)
    assert plan.batch.predicted_tokens == tokens
    assert f"predictions of {tokens} of them compared" in flat
    what = "the final states" if head == "student" else "what the terms read"
    assert f"outputs: {what} of {tokens} tokens (fp32, {width} wide: {token_bytes} bytes a token)" in flat
    stays = f"{out.stays:.1%}"
    assert row(text, f"{out.teacher_stage} -> {out.student_stage} outputs {tokens} {size(out.moved_bytes)} {stays}")
    assert ("LAYER MAP none: distill.mode none compares no states" in flat) == (not plan.pairs)
    assert ("wide: 0 bytes a state" in flat) is False and (
        f"{plan.batch.num_tokens} of them supervised" in flat
    ) == bool(plan.pairs)
    whole = plan.traffic.same_rank_bytes + plan.traffic.total_bytes
    assert row(
        text, f"stays on its rank {size(plan.traffic.same_rank_bytes)} {plan.traffic.same_rank_bytes / whole:.1%}"
    )


def term(**keys: Any) -> dict[str, Any]:
    return {"name": str(sorted(keys.items())), **keys}


TERMS = {
    "reverse": [term(kind="full")],
    "forward": [term(kind="full", divergence="forward")],
    "jensen_shannon": [term(kind="full", divergence="jensen_shannon")],
    "sampled": [term(kind="sampled")],
    "topk": [term(kind="topk")],
    "topk_of_teacher": [term(kind="topk", support="teacher")],
    "tail": [term(kind="topk", rest="tail", support="union")],
    "tail_of_teacher": [term(kind="topk", rest="tail", support="teacher"), term(kind="sampled", temperature=2.0)],
    "two_exact": [term(kind="full"), term(kind="full", divergence="forward")],
    "three_exact": [term(kind="full"), term(kind="full", divergence="forward"),
                    term(kind="full", divergence="jensen_shannon")],
    "three_temperatures": [term(kind="full"), term(kind="full", temperature=2.0), term(kind="sampled", temperature=3.0)],
    "of_all_kinds": [term(kind="topk"), term(kind="topk", rest="tail"), term(kind="sampled"), term(kind="full"),
                     term(kind="full", divergence="jensen_shannon", temperature=2.0)],
}  # fmt: skip
NUM_ROWS, AHEAD, BEHIND = 80, 0.95, 1.12
"""Tokens of a micro-batch, and how far measured over planned may be from 1."""


def peaks(folder: Path, terms: list[dict[str, Any]], dtype: str) -> list[tuple[str, int, int]]:
    """(what, bytes measured, bytes planned) of one micro-batch, with either side's head, on one rank."""
    config = OutputConfig(terms=terms, chunk_tokens=32)
    architecture = read_architecture(folder)
    layout = GridLayout(1, 1, 1, False, (architecture.num_layers,))
    model = ModelMemory(architecture, layout, dtype, 0, trained=True)
    vocab, width = model.sharding.vocab_size_padded, architecture.hidden_size
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    draw = lambda rows: torch.randn(rows, width, dtype=torch_dtype)  # noqa: E731
    rows, head, states, teacher_head = (
        draw(NUM_ROWS).requires_grad_(),
        draw(vocab).requires_grad_(),
        draw(NUM_ROWS),
        draw(vocab),
    )
    targets, weights = torch.randint(0, vocab, (NUM_ROWS,)), torch.full((len(terms), NUM_ROWS), 0.1)
    rest = config.terms, weights, architecture.vocab_size, dist.group.WORLD, config.chunk_tokens
    found = []

    def planned(side: Literal["student", "teacher"]) -> OutputMemory:
        return OutputMemory(config, OutputPlan(side, Wire("fp32", 0)), model, model, (NUM_ROWS, NUM_ROWS))

    def measure(what: str, teacher: TeacherHead | TeacherSummary, expected: int) -> None:
        with LiveBytes() as live:
            loss, _ = output_terms(rows, head, teacher, targets, *rest)
            loss.backward()
        rows.grad = head.grad = None
        found.append((what, live.peak, expected))

    measure("both heads", TeacherHead(states, teacher_head), planned("student")._student_step)
    if all(map(reads_few, config.terms)):
        with LiveBytes() as live:
            summary = summarize(states, teacher_head, targets, config.terms, *rest[2:])
        found.append(("summary", live.peak, planned("teacher")._teacher_step))
        measure("from a summary", TeacherSummary(summary), planned("teacher")._student_step)
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_logits_are_counted(tmp_path: Path, dtype: str) -> None:
    """Logits and the gradient of the head take what is planned, for every kind of term and several at once."""
    write_config(tmp_path, {**SMALL, "num_hidden_layers": 2, "vocab_size": 50_000})
    for name, terms in TERMS.items():
        for what, measured, planned in run_ranks(1, peaks, tmp_path, terms, dtype)[0]:
            assert AHEAD < measured / planned < BEHIND, f"{name}, {what}: {measured} measured, {planned} planned"
