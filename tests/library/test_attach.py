"""A loop of mcore's own parts with `attach` has the gradients of the formula, and of the project's trainer."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank
from transformers import AutoModelForCausalLM

from oprd_megatron.config.schema import DistillConfig, ParallelConfig
from oprd_megatron.library import (
    InProcessTeacher,
    TokenBatch,
    attach,
    megatron_batch,
    representation_step,
    schedules_with_teacher,
)
from oprd_megatron.representation.batch import Sample
from oprd_megatron.representation.layer_map import resolve_layer_pairs
from tests.library.user_models import (
    PLATFORM,
    Layout,
    architecture_of,
    chunks_of,
    gradients_of,
    lm_step,
    trained,
)
from tests.ranks import run_ranks
from tests.representation.test_gradients import assembled, sharded_gradients
from tests.tiny_models import as_in_files, tiny_hf_model

VOCAB, SIZE, WIDTH = 256, 16, 2
"""The vocabulary is one that Megatron does not pad: padding would be part of its cross-entropy."""
LENGTHS = [(5, 11), (3, 9), (8, 2), (1, 15), (6, 0), (7, 0), (4, 8), (2, 6)]
"""(prompt, response) tokens of the batch's sequences, two a micro-batch; the third micro-batch teaches nothing."""
RELATIVE = 1e-5
DISTILL = DistillConfig(
    positions="last_k", k=7, coefficient=3.0, layer_map={1: 2, 2: 2, 4: 5}, layer_weights=[1.0, 2.0, 3.0]
)
LM_WEIGHTS = (False, True)


@cache
def items() -> list[dict[str, torch.Tensor]]:
    """Micro-batches as Megatron-LM's loader gives them."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCAB, (len(LENGTHS), SIZE + 1), generator=generator)
    mask = torch.zeros(len(LENGTHS), SIZE)
    for row, (prompt, response) in enumerate(LENGTHS):
        mask[row, prompt - 1 : prompt - 1 + response] = 1
    mask[3, SIZE - 1] = 1  # predicts a token beyond the sequence: in the loop's own loss, and no state of ours
    positions = torch.arange(SIZE).expand(len(LENGTHS), SIZE).contiguous()
    whole = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask, "position_ids": positions}
    return [
        {name: value[i : i + WIDTH].contiguous() for name, value in whole.items()}
        for i in range(0, len(LENGTHS), WIDTH)
    ]


def samples() -> list[Sample]:
    """The same as the trainer's rollouts."""
    ids = torch.cat([item["tokens"] for item in items()]).tolist()
    return [Sample(tuple(row[:p]), tuple(row[p : p + r])) for row, (p, r) in zip(ids, LENGTHS, strict=True)]


def packed_batch(item: dict[str, torch.Tensor]) -> TokenBatch:
    """`megatron_batch` of a micro-batch that the loop packs."""
    return replace(megatron_batch(item), boundaries=tuple(range(0, SIZE * WIDTH + 1, SIZE)))


def get_inputs(layout: Layout) -> Any:
    """The loop's get_batch: (arguments of the model, labels, loss mask), cut over context parallelism."""

    def read(data_iterator: Any) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
        item = dict(next(data_iterator))
        if not layout.packed:
            mask = torch.ones(SIZE, SIZE, dtype=torch.bool).triu(1)[None, None]
            inputs = {"input_ids": item["tokens"], "position_ids": item["position_ids"], "attention_mask": mask}
            return inputs, item["labels"], item["loss_mask"]
        item = {name: value.reshape(1, -1) for name, value in get_batch_on_this_cp_rank(item).items()}
        bounds = torch.arange(0, SIZE * WIDTH + 1, SIZE, dtype=torch.int32)
        packing = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=SIZE, max_seqlen_kv=SIZE)
        inputs = {"input_ids": item["tokens"], "position_ids": item["position_ids"], "attention_mask": None}
        return {**inputs, "packed_seq_params": packing}, item["labels"], item["loss_mask"]

    return read


def loop(
    teacher_dir: Path, student_dir: Path, layout: Layout, teacher_parallel: ParallelConfig
) -> list[dict[str, Any]]:
    """One step of somebody's loop for each way of dividing, with and without the loop's own loss: this rank's gradients."""
    arch, found = architecture_of(student_dir), []
    with PLATFORM.scope():
        teacher = InProcessTeacher.load(
            teacher_dir, teacher_parallel, platform=PLATFORM, dtype="fp32", micro_batch_tokens=40
        )
        for per_token in (False, True):
            for lm in LM_WEIGHTS:
                bare = chunks_of(arch, student_dir, layout, per_token)
                wrapped = trained(bare)
                oprd = attach(wrapped, teacher, DISTILL)
                read = get_inputs(layout)
                own = lm_step(read) if lm else representation_step(oprd, lambda iterator, read=read: read(iterator)[0])
                results = run_step(oprd, wrapped, layout, own)
                assert oprd.report is not None
                found.append(gradients_of(bare, arch) | {"loss": oprd.report.loss, "results": results})
    return found


def run_step(oprd: Any, wrapped: list[Any], layout: Layout, forward_step: Any) -> list[Any]:
    """zero_grad and the schedule."""
    dp, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    mine = items()[rank * len(items()) // dp : (rank + 1) * len(items()) // dp]
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    read = packed_batch if layout.packed else megatron_batch
    several = layout.vpp > 1
    get = schedules_with_teacher(get_forward_backward_func, lambda model: oprd, read)
    return get()(
        forward_step_func=forward_step,
        data_iterator=[iter(mine) for _ in wrapped] if several else iter(mine),
        model=wrapped if several else wrapped[0],
        num_microbatches=len(mine),
        seq_length=SIZE * WIDTH // layout.cp if layout.packed else SIZE,
        micro_batch_size=1 if layout.packed else WIDTH,
        forward_only=False,
    )


def reference(teacher_dir: Path, student_dir: Path) -> tuple[float, dict[str, torch.Tensor], Any]:
    """Eq. 6 and the language-model loss written out on transformers' models, one sequence at a time: (loss, its gradients,
    {(per token, cp): gradients of the loop's own loss})."""
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (teacher_dir, student_dir)
    )
    pairs = resolve_layer_pairs(DISTILL, student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    weights = {pair.student_layer: weight / 2 for pair, weight in zip(pairs, (1.0, 2.0, 3.0), strict=True)}
    total, count, own = torch.zeros(()), 0, []
    for item in items():
        for ids, labels, mask in zip(item["tokens"], item["labels"], item["loss_mask"], strict=True):
            outputs = [model(ids[None], output_hidden_states=True) for model in (teacher, student)]
            own.append(torch.nn.functional.cross_entropy(outputs[1].logits[0], labels, reduction="none") * mask)
            prompt, response = LENGTHS[len(own) - 1]
            places = list(range(prompt, prompt + response))[-7:]
            count += len(places)
            for pair in pairs:
                h_t, h_s = (
                    output.hidden_states[layer][0, places]
                    for output, layer in zip(outputs, (pair.teacher_layer, pair.student_layer), strict=True)
                )
                squares = (h_s - h_t.detach()).square().mean(-1).sum()
                total = total + 3.0 * weights[pair.student_layer] * squares / len(pairs)
    masks = torch.cat([item["loss_mask"] for item in items()])
    losses = {(True, cp): torch.stack(own).sum() / masks.sum() for cp in (1, 2)}
    for cp in (1, 2):  # Megatron's mean over micro-batches is one of means over what a context-parallel rank holds
        sums, tokens = (of_cp_ranks(values, cp) for values in (torch.stack(own), masks))
        losses[False, cp] = (sums / tokens.clamp(min=1)).mean()
    named = dict(student.named_parameters())
    oprd, *of_own = (
        as_in_files(
            student, dict(zip(named, torch.autograd.grad(loss, list(named.values()), retain_graph=True), strict=True))
        )
        for loss in (total / count, *losses.values())
    )
    return (total / count).item(), oprd, dict(zip(losses, of_own, strict=True))


def of_cp_ranks(values: torch.Tensor, cp: int) -> torch.Tensor:
    """[sequences, S] -> sums [micro-batches, cp] of what each context-parallel rank holds of a micro-batch."""
    parts = values.view(-1, WIDTH, 2 * cp, SIZE // (2 * cp)).sum((1, 3))
    return parts[:, :cp] + parts[:, cp:].flip(1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Teacher and student directories, and what their gradients have to be."""
    folder = tmp_path_factory.mktemp("attach")
    teacher_dir, student_dir = folder / "teacher", folder / "student"
    tiny_hf_model("llama", teacher_dir, num_layers=5, vocab_size=VOCAB, std=0.1, seed=1)
    tiny_hf_model("llama", student_dir, num_layers=4, vocab_size=VOCAB, std=0.1, seed=2)
    loss, gradients, own = reference(teacher_dir, student_dir)
    return {"dirs": (teacher_dir, student_dir), "loss": loss, "gradients": gradients, "own": own}


CASES = {
    "single": (1, Layout(), ParallelConfig()),
    "tp2": (2, Layout(tp=2), ParallelConfig(pp=2)),
    "pp2": (2, Layout(pp=2), ParallelConfig(tp=2)),
    "dp2": (2, Layout(), ParallelConfig(dp=2)),
    "tp2sp": (2, Layout(tp=2, sp=True, packed=True), ParallelConfig(tp=2)),
    "cp2": (2, Layout(cp=2, packed=True), ParallelConfig(tp=2)),
    "pp2vpp2_recomputed": (2, Layout(pp=2, vpp=2, recompute=True), ParallelConfig(tp=2, sp=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_formulas(models: dict[str, Any], case: str) -> None:
    """Loss to 1e-6, every gradient element to 1e-5 of its tensor's largest: with the loop's own loss (mean over tokens, and
    Megatron's mean over micro-batches) and without."""
    world, layout, teacher_parallel = CASES[case]
    ranks = run_ranks(world, loop, *models["dirs"], layout, teacher_parallel, timeout_seconds=300)
    for number, (per_token, lm) in enumerate((per_token, lm) for per_token in (False, True) for lm in LM_WEIGHTS):
        here = [rank[number] for rank in ranks]
        expected = dict(models["gradients"])
        for name, gradient in models["own"][per_token, layout.cp].items() if lm else ():
            expected[name] = expected[name] + gradient
        assert all(rank["loss"] == pytest.approx(models["loss"], rel=1e-6) for rank in here)
        compare(assembled([rank for rank in here if rank["coords"].cp == 0], models["dirs"][1]), expected)
        logged = [result["oprd loss"].item() for rank in here for result in rank["results"]]
        assert logged and logged == pytest.approx([models["loss"]] * len(logged), rel=1e-6)


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Every element, relative to the tensor's largest."""
    for name, gradient in expected.items():
        difference, largest = (found[name] - gradient).abs().max().item(), gradient.abs().max().item()
        assert difference <= RELATIVE * largest, f"{name}: {difference} of {largest}"


def test_gradients_are_the_trainers(models: dict[str, Any]) -> None:
    """The formula that loops are compared with is what the project's trainer computes on the same tokens."""
    ranks = run_ranks(1, trainer_gradients, *models["dirs"], samples())
    assert ranks[0]["report"].loss == pytest.approx(models["loss"], rel=1e-6)
    compare(assembled(ranks, models["dirs"][1]), models["gradients"])


def trainer_gradients(teacher_dir: Path, student_dir: Path, rollouts: list[Sample]) -> dict[str, Any]:
    """`sharded_gradients` of these rollouts."""
    import tests.representation.test_gradients as trainer

    trainer.samples = lambda: rollouts  # type: ignore[assignment]
    return sharded_gradients(teacher_dir, student_dir, ParallelConfig(), DISTILL)
