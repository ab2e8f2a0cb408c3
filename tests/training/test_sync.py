"""The rollout engine holds the trainer's weights, and a run stops when it does not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import oprd_megatron.rollout.build
from oprd_megatron.config.schema import ParallelConfig
from oprd_megatron.errors import WeightSyncError
from oprd_megatron.platform import select_platform
from oprd_megatron.rollout.hf_engine import HFEngine
from oprd_megatron.rollout.probe import (
    PROBE_TOKENS,
    TOLERANCES,
    WRITTEN_TOKENS,
    Difference,
    check_probe,
    differing_weights,
    make_probe,
    probe_difference,
)
from oprd_megatron.rollout.prompts import Prompt
from oprd_megatron.rollout.weight_sync import sync_weights
from oprd_megatron.trainer import export_student
from tests.models.test_parity import build
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model
from tests.training.runs import changed, train_on_rank, with_layout

VOCAB = 300
LAYOUTS = {
    "single": ParallelConfig(),
    "tp2": ParallelConfig(tp=2),
    "tp2sp": ParallelConfig(tp=2, sp=True),
    "pp2": ParallelConfig(pp=2),
    "tp2pp2": ParallelConfig(tp=2, pp=2),
    "dp2": ParallelConfig(dp=2),
}
BROKEN = {"embedding": "model.embed_tokens.weight", "one layer": "model.layers.2.mlp.down_proj.weight"}


def synced(hf_dir: Path, out_dir: Path, parallel: ParallelConfig, pad_heads: bool) -> dict[str, Any]:
    """Change the model, export it, sync it. Returns the engine's weights and the probe's differences: after the sync, and
    after each of `BROKEN` was changed in the engine of the last rank only."""
    platform = select_platform("cpu")
    model = build(hf_dir, parallel, pad_heads)
    for parameter in model.chunks[0].parameters():
        parameter.data.mul_(1.01)
    export_student(model, hf_dir, out_dir, overwrite=False)
    engine = HFEngine(hf_dir, torch.float32, "cpu", batch_size=2)
    sync_weights(engine, model, version=1)
    weights = {name: weight.clone() for name, weight in engine._weights.items()}
    probe = make_probe([Prompt(0, "", tuple(range(4, 40))), Prompt(1, "", tuple(range(290, 200, -1)))], context=72)
    differences = {"synced": probe_difference(engine, model, platform, probe)}
    differing = {"synced": differing_weights(engine, model)}
    for what, name in BROKEN.items():
        if dist.get_rank() == dist.get_world_size() - 1:
            engine._weights[name].data[5].add_(0.05)
        differences[what] = probe_difference(engine, model, platform, probe)
        differing[what] = differing_weights(engine, model)
        sync_weights(engine, model, version=1)
    return {"weights": weights, "differences": differences, "differing": differing}


def check_sync(tmp_path: Path, parallel: ParallelConfig, pad_heads: bool) -> None:
    world = parallel.tp * parallel.pp * (parallel.dp or 1)
    ranks = run_ranks(world, synced, tmp_path / "student", tmp_path / "out", parallel, pad_heads)
    exported, source = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "student"))
    for rank in ranks:
        assert set(rank["weights"]) == set(exported)
        for name, weight in rank["weights"].items():
            assert torch.equal(weight, exported[name]), name
            assert not torch.equal(weight, source[name]), f"{name} was not changed: the test shows nothing"
        assert rank["differences"]["synced"].max < 1e-4
        assert rank["differing"] == {"synced": [], **{what: [name] for what, name in BROKEN.items()}}
        check_probe(rank["differences"]["synced"], TOLERANCES[torch.float32], version=1)
        for what in BROKEN:
            with pytest.raises(WeightSyncError, match="version 3: engine and trainer differ by"):
                check_probe(rank["differences"][what], TOLERANCES[torch.float32], version=3)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_engine_gets_every_weight(tmp_path: Path, layout: str, tied: bool) -> None:
    """On every rank the engine's parameters are the export's bit for bit and the probe agrees to 1e-4 nats; a change of one
    row in one rank's engine is seen by all ranks."""
    tiny_hf_model("llama", tmp_path / "student", vocab_size=VOCAB, std=0.1, tied=tied)
    check_sync(tmp_path, LAYOUTS[layout], pad_heads=False)


def test_padded_heads_stay_behind(tmp_path: Path) -> None:
    """Heads and ids that were padded for tp are cut off on the way to the engine."""
    tiny_hf_model("llama", tmp_path / "student", heads=9, kv_heads=3, hidden_size=72, vocab_size=VOCAB, std=0.1)
    check_sync(tmp_path, ParallelConfig(tp=2), pad_heads=True)


def test_nothing_but_a_small_difference_passes() -> None:
    """Neither infinity nor NaN, on either side, is taken for agreement; bf16 has a bound on the mean as well."""
    allowed = TOLERANCES[torch.float32]
    check_probe(Difference(0.0, 0.0), allowed, version=1)
    for difference in (2e-3, math.inf, math.nan):
        with pytest.raises(WeightSyncError, match="weight sync of version 1"):
            check_probe(Difference(difference, 0.0), allowed, version=1)
    check_probe(Difference(0.3, 0.05), TOLERANCES[torch.bfloat16], version=1)
    with pytest.raises(WeightSyncError, match=r"0\.07 on average"):
        check_probe(Difference(0.3, 0.07), TOLERANCES[torch.bfloat16], version=1)


def test_the_message_names_weights() -> None:
    """Those whose checksums differ, five of them; where none does, that is said."""
    found, allowed = Difference(1.0, 1.0), TOLERANCES[torch.float32]
    with pytest.raises(WeightSyncError, match=r"other checksums than the trainer's: w0, w1, w2, w3, w4 and 2 more$"):
        check_probe(found, allowed, 1, [f"w{number}" for number in range(7)])
    with pytest.raises(WeightSyncError, match="every weight that it received has the trainer's checksum"):
        check_probe(found, allowed, 1)


class ForgetfulEngine(HFEngine):
    """Takes version 2 and keeps the weights of version 1."""

    def update_weights(self, version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        if version == 2:
            for _ in tensors:
                pass
            self._version = version
        else:
            super().update_weights(version, tensors)


def forgetful_run(values: dict[str, Any], forgetful_rank: int) -> str:
    if dist.get_rank() == forgetful_rank:
        oprd_megatron.rollout.build.HFEngine = ForgetfulEngine
    with pytest.raises(WeightSyncError) as caught:
        train_on_rank(values)
    return str(caught.value)


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"dp": 2}], ids=str)
def test_a_lost_update_stops_the_run(values: dict[str, Any], layout: dict[str, int]) -> None:
    """An engine that silently loses one update, on one rank, stops every rank at that update; the checkpoint before it
    stays the newest."""
    values = with_layout(changed(values, run={"steps": 4}, optimizer={"lr": 1e-2, "warmup_fraction": 0.0}), **layout)
    values = {**values, "checkpoint": {"every": 1}, "eval": None}
    world = 2 if layout else 1
    errors = run_ranks(world, forgetful_run, values, world - 1)
    assert len(set(errors)) == 1 and "\n" not in errors[0]
    assert "weight sync of version 2" in errors[0] and "does not hold the student's weights" in errors[0]
    tracker = Path(values["run"]["dir"]) / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "1"


def test_probes_are_as_long_as_they_can_be() -> None:
    """Two texts, made of one-token prompts if need be, with room for what is written after them."""
    short, long = Prompt(0, "a", (7,)), Prompt(1, "b", tuple(range(100)))
    one, two = make_probe([short, long], context=28)
    assert one.token_ids == (7,) * (28 - WRITTEN_TOKENS) and two.token_ids == tuple(range(20))
    assert [len(text.token_ids) for text in make_probe([short], context=10_000)] == [PROBE_TOKENS] * 2
    assert [len(text.token_ids) for text in make_probe([short], context=3)] == [2, 2]
