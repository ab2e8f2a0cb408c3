"""Training on text of a real vLLM server: the embedded engine's run, whatever the schedule; and a lost weight is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from oprd_megatron.errors import WeightSyncError
from oprd_megatron.rollout import weight_sync
from oprd_megatron.rollout.vllm.processes import ServerProcess
from tests.ranks import run_ranks
from tests.rollout.vllm_server import running_server
from tests.tiny_models import tiny_hf_model
from tests.training.runs import (
    changed,
    student_tensors,
    tiny_run,
    tiny_values,
    train_on_rank,
    train_records,
    train_run,
    with_layout,
)

pytestmark = pytest.mark.vllm

LOST = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run whose student has heads as wide as vLLM wants them."""
    folder = tmp_path_factory.mktemp("vllm")
    tiny_run(folder)
    for name, layers, seed in (("teacher", 5, 1), ("student", 4, 2)):
        shape = {"hidden_size": 128, "heads": 2, "kv_heads": 2, "ffn": 192}
        tiny_hf_model("llama", folder / name, num_layers=layers, seed=seed, std=0.1, **shape)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    """A server of that student."""
    with running_server(folder / "student", folder, context=512) as started:
        yield started


def run_of(folder: Path, name: str, **rollout: Any) -> dict[str, Any]:
    """A run of three greedy steps in a directory of its own."""
    values = {**tiny_values(folder), "eval": None}
    greedy = {"temperature": 0.0, "max_response_tokens": 24, "mismatch": {"every": 1}}
    return changed(values, run={"dir": str(folder / name)}, rollout={**greedy, **rollout})


def on_server(server: ServerProcess, **rollout: Any) -> dict[str, Any]:
    return {"engine": "vllm_server", "server": {"urls": [server.url], "bucket_bytes": 200_000}, **rollout}


@pytest.fixture(scope="module")
def embedded(folder: Path) -> Path:
    """The run with the embedded engine."""
    return train_run(run_of(folder, "embedded"))


@pytest.mark.parametrize("schedule", ["sync", "overlap"])
@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}], ids=["single", "tp2", "pp2"])
def test_it_is_the_embedded_engines_run(
    folder: Path, server: ServerProcess, embedded: Path, schedule: str, layout: dict[str, int]
) -> None:
    """Greedy text of three versions of the weights: losses and the trained student are those of the run on transformers; every
    probe and every rollout's log-probability agrees with the trainer's."""
    rollout = on_server(server, schedule=schedule, overlap_tokens=40)
    run = train_run(with_layout(run_of(folder, f"{schedule}-{'-'.join(layout) or 'single'}", **rollout), **layout))
    records, wanted = train_records(run), train_records(embedded)
    assert [record["loss"] for record in records] == pytest.approx([record["loss"] for record in wanted], rel=1e-4)
    for record in records:
        assert record["probe_difference"] < 1e-3 and record["mismatch"]["max_abs"] < 1e-3
        assert record["staleness"] == 0
    found = student_tensors(run)
    for name, tensor in student_tensors(embedded).items():
        assert (tensor - found[name]).abs().max().item() <= 1e-5, name


def test_one_step_off_says_so(folder: Path, server: ServerProcess, embedded: Path) -> None:
    """The second and third steps learn from text of the version before, which the mismatch shows too."""
    run = train_run(run_of(folder, "one_step_off", **on_server(server, schedule="one_step_off")))
    records, wanted = train_records(run), train_records(embedded)
    assert [record["staleness"] for record in records] == [0, 1, 1]
    assert records[0]["loss"] == pytest.approx(wanted[0]["loss"], rel=1e-4)
    assert records[0]["mismatch"]["max_abs"] < 1e-3 < records[2]["mismatch"]["max_abs"]


def lose_a_weight(values: dict[str, Any]) -> str:
    """On a rank: from version 2 on the engine gets another `LOST` than the trainer has."""
    stream = weight_sync.stream_hf_weights
    calls = []

    def broken(*args: Any) -> Iterator[tuple[str, torch.Tensor]]:
        calls.append(1)
        for name, tensor in stream(*args):
            yield name, tensor + 0.05 if name == LOST and len(calls) > 2 else tensor

    weight_sync.stream_hf_weights = broken
    with pytest.raises(WeightSyncError) as caught:
        train_on_rank(values)
    return str(caught.value)


def test_a_broken_weight_is_named(folder: Path, server: ServerProcess) -> None:
    """One tensor that is not the trainer's is seen by the probe after that sync, and the run stops with its name."""
    message = run_ranks(1, lose_a_weight, run_of(folder, "broken", **on_server(server)))[0]
    assert "weight sync of version 2" in message and "\n" not in message
    assert message.endswith(f"these weights have other checksums than the trainer's: {LOST}")
