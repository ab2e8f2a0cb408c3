"""Problems asked of a real vLLM server: what the embedded engine answers, also while training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oprd_megatron.benchmarks.standalone import benchmark_student
from oprd_megatron.config.benchmark import BenchmarkConfig
from oprd_megatron.config.load import parse_config
from oprd_megatron.rollout.vllm.processes import ServerProcess
from tests.rollout.vllm_server import running_server
from tests.tiny_models import tiny_hf_model
from tests.training.runs import changed, tiny_run, tiny_values, train_records, train_run

pytest.importorskip("math_verify")
pytestmark = pytest.mark.vllm

CONTEXT = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run whose student has heads as wide as vLLM wants them, and problems."""
    folder = tmp_path_factory.mktemp("benchmark")
    tiny_run(folder)
    for name, layers, seed in (("teacher", 5, 1), ("student", 4, 2)):
        shape = {"hidden_size": 128, "heads": 2, "kv_heads": 2, "ffn": 192}
        tiny_hf_model("llama", folder / name, num_layers=layers, seed=seed, std=0.1, **shape)  # type: ignore[arg-type]
    write_problems(folder / "sums.json", "say {}")
    write_problems(folder / "long.json", "say {} " * 40)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    """A server of that student, with a shorter context than the student has."""
    with running_server(folder / "student", folder, CONTEXT) as started:
        yield started


def write_problems(path: Path, text: str) -> None:
    path.write_text(
        json.dumps([{"problem": text.replace("{}", str(number)), "answer": str(number)} for number in range(3)])
    )


def asked(path: Path, **settings: Any) -> dict[str, Any]:
    return {"files": [str(path)], "samples": 1, "temperature": 0.0, "max_response_tokens": 12, **settings}


def on_server(folder: Path, server: ServerProcess, name: str) -> dict[str, Any]:
    urls = {"urls": [server.url], "bucket_bytes": 200_000}
    values = {**tiny_values(folder), "eval": None}
    return changed(values, run={"dir": str(folder / name)}, rollout={"engine": "vllm_server", "server": urls})


def responses(out: Path) -> list[list[int]]:
    rows = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    return [row["response_ids"] for row in sorted(rows, key=lambda row: row["sample_index"])]


def test_servers_answer_as_the_embedded_engine_does(folder: Path, server: ServerProcess) -> None:
    """Greedy, token for token."""
    settings = BenchmarkConfig(**asked(folder / "sums.json"))
    for name, values in (("hf", tiny_values(folder)), ("vllm", on_server(folder, server, "unused"))):
        benchmark_student(parse_config(values, "test"), settings, folder / "student", folder / name)
    assert responses(folder / "vllm") == responses(folder / "hf")


def test_a_run_asks_its_servers(folder: Path, server: ServerProcess) -> None:
    """Before, between and after."""
    values = {**on_server(folder, server, "run"), "benchmark": asked(folder / "sums.json", every=2)}
    records = train_records(train_run(values), "benchmark")
    assert [record["step"] for record in records] == [0, 2, 3]


def test_a_problem_that_servers_have_no_room_for_is_refused(folder: Path, server: ServerProcess) -> None:
    """Before models load: training's own prompts would fit."""
    values = {**on_server(folder, server, "refused"), "benchmark": asked(folder / "long.json")}
    with pytest.raises(
        AssertionError,
        match=f"ConfigError: .* context of {CONTEXT} tokens, but the longest prompt with its response has",
    ):
        train_run(values)
