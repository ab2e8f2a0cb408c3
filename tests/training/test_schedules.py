"""Schedules of rollouts and updates: overlap gives the update of sync, one_step_off is one version behind and says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from checkpoints_conversion.live.weights import stream_hf_weights
from oprd_megatron.config import parse_config
from oprd_megatron.errors import DataError, WeightSyncError
from oprd_megatron.models import DTYPES
from oprd_megatron.placing import build_all
from oprd_megatron.platform import select_platform
from oprd_megatron.preflight import preflight
from oprd_megatron.rollout import HFEngine, Request, Rollout, SamplingParams
from oprd_megatron.rollout.probe import PROBE_STEP
from oprd_megatron.trainer import Trainer
from tests.ranks import run_ranks
from tests.training.runs import changed, num_ranks, tiny_run, with_layout
from tools.slow_engine import SlowEngine

SECONDS_PER_TOKEN = 0.02
FULL_KL = {"terms": [{"kind": "full"}, {"kind": "sampled", "weight": 0.5}]}


class Stale(HFEngine):
    """Says that its text is of an older version than it is."""

    def generate(self, requests: list[Request], params: SamplingParams, step: int) -> list[Rollout]:
        return [replace(r, weight_version=r.weight_version - 1) for r in super().generate(requests, params, step)]


class Silent(HFEngine):
    """Writes nothing in a step; the probe is answered."""

    def generate(self, requests: list[Request], params: SamplingParams, step: int) -> list[Rollout]:
        rollouts = super().generate(requests, params, step)
        return rollouts if step == PROBE_STEP else [replace(rollout, response_ids=()) for rollout in rollouts]


def make_trainer(values: dict[str, Any], engine: type[HFEngine] = HFEngine) -> Trainer:
    config = parse_config(values, "test")
    platform = select_platform("cpu")
    checked = preflight(config, dist.get_world_size())
    teachers, student = build_all(checked, platform)

    def make_engine() -> SlowEngine | None:
        if dist.get_rank() != student.grid.layout.first_rank:
            return None
        return SlowEngine(engine(config.student.path, DTYPES["fp32"], "cpu", 64), SECONDS_PER_TOKEN, slots=4)

    trainer = Trainer(checked, teachers, student, platform, make_engine)
    trainer.sync(0)
    return trainer


def steps(values: dict[str, Any], count: int) -> dict[str, Any]:
    """On a rank: the records of some steps, and the student after them."""
    trainer = make_trainer(values)
    records = [trainer.step(step) for step in range(count)]
    student, grid = trainer.student, trainer.student.grid
    weights = {}
    if grid.is_member:
        stream = stream_hf_weights(
            student.chunks, student.architecture, student.sharding, grid.groups.tp, grid.groups.pp
        )
        weights = {name: tensor.clone() for name, tensor in stream}
    updates = trainer.engine.updates if isinstance(trainer.engine, SlowEngine) else []
    return {"records": records, "weights": weights, "updates": updates}


def scheduled(values: dict[str, Any], schedule: str, **rollout: Any) -> dict[str, Any]:
    return {**changed(values, rollout={"engine": "vllm_server", "schedule": schedule, **rollout}), "eval": None}


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    found = tiny_run(tmp_path)
    found["rollout"] |= {"temperature": 1.5, "stop": ["a", "e", "o"]}  # so that lengths differ
    return found


@pytest.mark.parametrize(
    ("layout", "sections"),
    [
        ({}, {}),
        ({}, {"output": FULL_KL}),
        ({"tp": 2}, {"output": FULL_KL}),
        ({"dp": 2}, {}),
        ({"pp": 2}, {"output": FULL_KL}),
    ],
    ids=["states", "states+terms", "tp2", "dp2", "pp2"],
)
def test_overlap_gives_the_update_of_sync(
    values: dict[str, Any], layout: dict[str, int], sections: dict[str, Any]
) -> None:
    """Two steps, the second on text of the first's weights: same text, loss, measures and weights, up to rounding."""
    values = {**with_layout(values, **layout), **sections}
    if sections:
        values["output"]["terms"][1]["temperature"] = 1.5
    ranks = num_ranks(values)
    sync = run_ranks(ranks, steps, scheduled(values, "sync"), 2)
    groups = run_ranks(ranks, steps, scheduled(values, "overlap", overlap_tokens=6), 2)
    for mine, theirs in zip(groups, sync, strict=True):
        for one, other in zip(mine["records"], theirs["records"], strict=True):
            assert one["chunks"] > other["chunks"], "the step was not cut into groups"
            for name in ("loss", "cosine", "grad_norm"):
                assert one[name] == pytest.approx(other[name], rel=2e-5), name
            assert one.get("terms", {}) == pytest.approx(other.get("terms", {}), rel=2e-5)
            assert one["layers"]["mse"] == pytest.approx(other["layers"]["mse"], rel=2e-5)
            for name in ("supervised_tokens", "response_length", "staleness", "weight_version"):
                assert one[name] == other[name], name
        for name, tensor in theirs["weights"].items():
            assert (tensor - mine["weights"][name]).abs().max().item() <= 2e-6, name


def test_groups_without_a_supervised_token_wait(values: dict[str, Any]) -> None:
    """If no response has a token, the step is refused in one line, not divided by zero."""
    with pytest.raises(AssertionError, match="no token of this batch is supervised") as caught:
        run_ranks(1, refused, scheduled(values, "overlap", overlap_tokens=6), Silent)
    assert DataError.__name__ in str(caught.value)


def refused(values: dict[str, Any], engine: type[HFEngine]) -> None:
    make_trainer(values, engine).step(0)


def test_one_step_off_is_one_version_behind(values: dict[str, Any]) -> None:
    """Steps after the first learn from text of the weights before the last update, and the record says so; the engine is given
    weights only while it writes nothing, and the first step is that of sync."""
    sync = run_ranks(1, steps, scheduled(values, "sync"), 3)[0]
    off = run_ranks(1, steps, scheduled(values, "one_step_off"), 3)[0]
    assert [record["staleness"] for record in sync["records"]] == [0, 0, 0]
    assert [record["staleness"] for record in off["records"]] == [0, 1, 1]
    assert off["records"][0]["loss"] == sync["records"][0]["loss"]
    assert off["records"][1]["loss"] != sync["records"][1]["loss"]
    assert off["updates"] == sync["updates"] == [0, 1, 2, 3]


@pytest.mark.parametrize(("schedule", "allowed"), [("sync", 0), ("overlap", 0), ("one_step_off", 1)])
def test_text_that_is_too_old_is_refused(values: dict[str, Any], schedule: str, allowed: int) -> None:
    """The bound is enforced on what arrives, whatever the engine did."""
    with pytest.raises(AssertionError, match=f"{schedule} allows {allowed}") as caught:
        run_ranks(1, two_steps, scheduled(values, schedule), Stale)
    assert WeightSyncError.__name__ in str(caught.value)


def two_steps(values: dict[str, Any], engine: type[HFEngine]) -> None:
    trainer = make_trainer(values, engine)
    trainer.step(0)
    trainer.step(1)


@pytest.mark.parametrize("schedule", ["sync", "overlap"])
def test_masked_responses_count_in_the_mean(values: dict[str, Any], schedule: str) -> None:
    """A truncated response that is masked teaches nothing, and its tokens make the step smaller; dropped, they do not. Both
    schedules agree."""
    values["optimizer"]["clip_grad"] = 0.0
    how = {
        what: run_ranks(1, steps, scheduled(values, schedule, truncated=what, overlap_tokens=6), 1)[0]["records"][0]
        for what in ("keep", "drop", "mask")
    }
    waste = how["mask"]["waste"]
    assert 0 < waste["truncated"] < 1 and waste["masked"] == waste["truncated"] == how["drop"]["waste"]["dropped"]
    assert waste["wasted_tokens"] == how["drop"]["waste"]["wasted_tokens"] > 0
    share = how["drop"]["supervised_tokens"] / how["mask"]["supervised_tokens"]
    assert how["mask"]["supervised_tokens"] == how["keep"]["supervised_tokens"]
    assert share == pytest.approx(1 - waste["wasted_tokens"])
    for name in ("loss", "grad_norm"):
        assert how["mask"][name] == pytest.approx(how["drop"][name] * share, rel=1e-4), name
        assert how["drop"][name] != pytest.approx(how["keep"][name], rel=1e-3), name


def test_mismatch_is_measured(values: dict[str, Any]) -> None:
    """Rounding in sync; more, and a smaller effective sample size, where the text is one version behind."""
    values["rollout"]["mismatch"] = {"every": 1}
    values["optimizer"]["lr"] = 1e-2
    sync, off = (run_ranks(1, steps, scheduled(values, name), 3)[0]["records"] for name in ("sync", "one_step_off"))
    for record in [*sync, off[0]]:
        assert record["mismatch"]["max_abs"] < 1e-4
        assert record["mismatch"]["sequence_ess"] == pytest.approx(1.0, abs=1e-3)
    assert off[2]["mismatch"]["mean_abs"] > 1e-3
    assert off[2]["mismatch"]["sequence_ess"] < 0.9999


def test_the_gate_stops(values: dict[str, Any]) -> None:
    """Text of weights that are too far away stops the run where it is asked to."""
    values["rollout"]["mismatch"] = {"gate": "stop", "limit": 1e-3}
    values["optimizer"]["lr"] = 1e-2
    with pytest.raises(
        AssertionError, match=r"step \d: the engine's log-probabilities of \d of 8 responses are further than"
    ):
        run_ranks(1, steps, scheduled(values, "one_step_off"), 3)
