"""NeMo-RL's loop with OPRD in it, against a stand-in of its interface: gradients are those of the formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from transformers import AutoModelForCausalLM

from oprd_megatron.config.schema import ParallelConfig
from oprd_megatron.library import InProcessTeacher, StatesInBatch, attach
from tests.library import nemo_rl_stub
from tests.library.test_attach import DISTILL, SIZE, WIDTH, compare, items, reference
from tests.library.user_models import PLATFORM, Layout, architecture_of, chunks_of, gradients_of, trained
from tests.ranks import run_ranks
from tests.representation.test_gradients import assembled
from tests.tiny_models import tiny_hf_model

CASES = {"packed_pp2": (2, Layout(pp=2, packed=True)), "dp2": (2, Layout()), "states_in_batch": (1, Layout())}


def microbatches(packed: bool) -> list[nemo_rl_stub.ProcessedMicrobatch]:
    """The batch of test_attach.py as NeMo-RL has it: masks at the tokens themselves, packs filled up to 40 tokens."""
    found = []
    for item in items():
        mask = torch.zeros_like(item["loss_mask"])
        mask[:, 1:] = item["loss_mask"][:, :-1]
        lengths = torch.tensor([SIZE, 13]) if mask[1, 13:].sum() == 0 else torch.tensor([SIZE, SIZE])
        data = {
            "input_ids": item["tokens"],
            "token_mask": mask,
            "sample_mask": torch.ones(WIDTH),
            "input_lengths": lengths,
        }
        if not packed:
            causal = torch.ones(SIZE, SIZE, dtype=torch.bool).triu(1)[None, None]
            found.append(
                nemo_rl_stub.ProcessedMicrobatch(data, *[item["tokens"]] * 2, causal, item["position_ids"], None, None)
            )
            continue
        ids = torch.zeros(1, 40, dtype=torch.int64)
        for row, start, length in zip(item["tokens"], (0, SIZE), lengths.tolist(), strict=True):
            ids[0, start : start + length] = row[:length]
        bounds = torch.tensor([0, SIZE, 40], dtype=torch.int32)
        packing = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=24, max_seqlen_kv=24)
        found.append(nemo_rl_stub.ProcessedMicrobatch(data, ids, ids, None, None, packing, bounds))
    return found


def train(teacher_dir: Path, student_dir: Path, layout: Layout, in_batch: bool) -> dict[str, Any]:
    """One step with NeMo-RL's arithmetic and `RepresentationLoss`: this rank's gradients and metrics."""
    nemo_rl_stub.install()
    from oprd_megatron.library.nemo_rl import STATES, RepresentationLoss, around_nemo_rl

    arch = architecture_of(student_dir)
    with PLATFORM.scope():
        teacher: Any = InProcessTeacher.load(teacher_dir, ParallelConfig(), platform=PLATFORM, dtype="fp32")
        bare = chunks_of(arch, student_dir, layout, per_token=True)
        wrapped = trained(bare)
        oprd = attach(wrapped, StatesInBatch(5, 32) if in_batch else teacher, DISTILL)
        dp, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        mine = microbatches(layout.packed)
        mine = mine[rank * len(mine) // dp : (rank + 1) * len(mine) // dp]
        for batch in mine if in_batch else ():
            batch.data_dict[STATES] = states_of(teacher_dir, batch.input_ids)
        wrapped[0].zero_grad_buffer()
        loss_fn, counts = RepresentationLoss(), torch.ones(())
        assert (loss_fn.loss_type, loss_fn.input_type) == (
            nemo_rl_stub.LossType.TOKEN_LEVEL,
            nemo_rl_stub.LossInputType.LOGIT,
        )
        results = around_nemo_rl(oprd, nemo_rl_stub.megatron_forward_backward)(
            model=wrapped[0], data_iterator=iter(mine), num_microbatches=len(mine), seq_length=40 if layout.packed else SIZE,
            mbs=1 if layout.packed else WIDTH, loss_fn=loss_fn, global_valid_seqs=counts, global_valid_toks=counts,
        )  # fmt: skip
        return gradients_of(bare, arch) | {"loss": sum(metrics["oprd_loss"] for metrics in results)}


def states_of(teacher_dir: Path, ids: torch.Tensor) -> torch.Tensor:
    """[B, S, layers, D] of the teacher layers that DISTILL names."""
    model = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    return torch.stack([states[2], states[5]], dim=2)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_formulas(tmp_path: Path, case: str) -> None:
    """Packed over two stages, data parallel, and with states that came in the batch; "oprd_loss" adds up to the loss."""
    world, layout = CASES[case]
    teacher_dir, student_dir = tmp_path / "teacher", tmp_path / "student"
    tiny_hf_model("llama", teacher_dir, num_layers=5, vocab_size=256, std=0.1, seed=1)
    tiny_hf_model("llama", student_dir, num_layers=4, vocab_size=256, std=0.1, seed=2)
    loss, expected, _ = reference(teacher_dir, student_dir)
    ranks = run_ranks(world, train, teacher_dir, student_dir, layout, case == "states_in_batch")
    assert sum(rank["loss"] for rank in ranks) == pytest.approx(loss, rel=1e-6)
    compare(assembled(ranks, student_dir), expected)
