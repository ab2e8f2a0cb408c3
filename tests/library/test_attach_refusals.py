"""What cannot be right in somebody's loop is one line, and no wrong gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from oprd_megatron.config.precision import PrecisionConfig
from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.errors import UserError
from oprd_megatron.library import InProcessTeacher, StatesInBatch, TokenBatch, attach, megatron_batch
from oprd_megatron.models.weight_only import weight_only_modules
from tests.library.test_attach import SIZE, WIDTH, get_inputs, items
from tests.library.user_models import PLATFORM, Layout, architecture_of, chunks_of, lm_step, trained
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model


def said(call: Any, *arguments: Any, **keywords: Any) -> str:
    """The error of a call; "" if there is none."""
    try:
        call(*arguments, **keywords)
    except UserError as error:
        return str(error)
    return ""


def refusals(folder: Path) -> dict[str, str]:
    """{mistake: what is said to it}."""
    with PLATFORM.scope():
        bare = chunks_of(architecture_of(folder / "student"), folder / "student", Layout(), per_token=True)
        (model,) = trained(bare)
        teacher = InProcessTeacher.load(folder / "teacher", platform=PLATFORM, dtype="fp32")
        small = InProcessTeacher.load(folder / "small", platform=PLATFORM, dtype="fp32")
        in_fp8 = InProcessTeacher.load(
            folder / "teacher", platform=PLATFORM, dtype="fp32", precision=PrecisionConfig(linear="weight_only")
        )
        assert weight_only_modules(in_fp8.model.chunks)
        distill = DistillConfig(positions="all")
        found = {
            "linear": said(attach, model, teacher, DistillConfig(mode="linear")),
            "widths": said(attach, model, StatesInBatch(5, 48), distill),
            "no GPTModel": said(attach, torch.nn.Linear(2, 2), teacher, distill),
        }

        def run(oprd: Any, batch: Any, divides: bool = True) -> None:
            model.zero_grad_buffer()
            oprd.around(get_forward_backward_func(), batch, divides)(
                forward_step_func=lm_step(get_inputs(Layout())), data_iterator=iter(items()), model=model,
                num_microbatches=len(items()), seq_length=SIZE, micro_batch_size=WIDTH, forward_only=False,
            )  # fmt: skip

        def never(oprd: Any) -> None:
            with oprd.step([megatron_batch(items()[0])]):
                pass

        oprd = attach(model, teacher, distill)
        found["tokens"] = said(run, oprd, lambda item: replace(megatron_batch(item), loss_tokens=1))
        found["divides"] = said(run, oprd, megatron_batch, divides=False)
        found["never ran"] = said(never, oprd)
        found["lengths"] = said(TokenBatch.of, torch.zeros(2, 4), torch.zeros(2, 5))
        found["right"] = said(run, oprd, megatron_batch)
        nothing = lambda item: replace(megatron_batch({**item, "loss_mask": item["loss_mask"] * 0}), loss_tokens=13)  # noqa: E731
        found["right"] += said(run, oprd, nothing) + ("" if oprd.report.loss == 0 else "a loss of nothing")
        oprd.detach()
        oprd = attach(model, small, distill)
        found["vocabulary"] = said(run, oprd, megatron_batch)
        oprd.detach()
        oprd = attach(model, StatesInBatch(5, 32), DistillConfig(positions="all", layers="last"))
        found["states"] = said(run, oprd, megatron_batch)
        return found


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    """Each says what, where and what to do; a loop without a mistake runs."""
    for name, layers, vocab in (("teacher", 5, 256), ("student", 4, 256), ("small", 5, 128)):
        tiny_hf_model("llama", tmp_path / name, num_layers=layers, vocab_size=vocab, std=0.1)
    (found,) = run_ranks(1, refusals, tmp_path)
    expected = {
        "linear": "attach: distill.mode: linear is the trainer's alone; use identity or a bridge (low_rank)",
        "widths": "teacher and student differ in width (48 and 32)",
        "no GPTModel": "attach: the model is a Linear; give mcore's GPTModel",
        "tokens": "oprd: loss_func returned 52 tokens in this step, but the batches say 4; set TokenBatch.loss_tokens",
        "divides": "oprd: loss_func returned 52 tokens in this step, but the batches say 0",
        "never ran": "oprd: the schedule took layer 1 through 0 micro-batches, but the step was of 1",
        "lengths": "tokens are [2, 4] and the response mask [2, 5]; both must be [B, S]",
        "vocabulary": "is not one of the teacher's 128: another tokenizer",
        "states": "micro-batch 0 holds nothing of teacher layer 5, but its 20 supervised tokens need [20, 32]",
    }
    assert found.pop("right") == "" and found.keys() == expected.keys()
    for mistake, line in expected.items():
        assert line in found[mistake] and "\n" not in found[mistake], (mistake, found[mistake])
