"""An engine whose answers are known, and a process that is killed while it writes them.

python -m tests.benchmarks.scripted_engine FOLDER: run the benchmark in FOLDER until the engine kills the process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from oprd_megatron.benchmarks.grading import Grader
from oprd_megatron.benchmarks.run import load_benchmark, run_benchmark, sampling
from oprd_megatron.config.benchmark import BenchmarkConfig
from oprd_megatron.rollout.engine import Request, Rollout, SamplingParams
from tests.tiny_models import tiny_tokenizer

PROBLEMS, SAMPLES, LIMIT = 4, 3, 40
GIVEN = {0: "so \\boxed{0}", 1: "I do not know.", 2: "it is \\boxed{2} of course and so on and on and on"}
"""Response of each sample: right for problem 0; none; right for problem 2, but cut."""


class ScriptedEngine:
    """A `RolloutEngine` with `start`, one response at a time. After `dies_after` responses it kills the process.

    Attributes:
        written: sample indices that were asked of it.
    """

    replica = None

    def __init__(self, dies_after: int | None = None) -> None:
        self.tokenizer, self.dies_after, self.written = tiny_tokenizer(), dies_after, list[int]()

    def generate(self, requests: list[Request], params: SamplingParams, step: int) -> list[Rollout]:
        return [self._write(request, params) for request in requests]

    def update_weights(self, version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        raise AssertionError("a benchmark changes no weights")

    def score(self, token_ids: list[list[int]]) -> list[torch.Tensor]:
        raise AssertionError("a benchmark scores nothing")

    def score_each(self, token_ids: list[list[int]]) -> dict[str, list[torch.Tensor]]:
        raise AssertionError("a benchmark scores nothing")

    def checksums(self) -> dict[str, dict[str, int]]:
        return {}

    def close(self) -> None:
        pass

    def _write(self, request: Request, params: SamplingParams) -> Rollout:
        if self.dies_after == len(self.written):
            os.kill(os.getpid(), signal.SIGKILL)
        self.written.append(request.sample_index)
        ids = self.tokenizer(GIVEN[request.sample_index % SAMPLES], add_special_tokens=False)["input_ids"]
        cut = tuple(ids[: params.max_response_tokens])
        return Rollout(
            request.prompt.index, request.sample_index, request.prompt.token_ids, cut, 0, len(cut) == len(ids)
        )


class StartingEngine(ScriptedEngine):
    """The same, giving each response as it is written."""

    def start(self, requests: list[Request], params: SamplingParams, step: int) -> OneByOne:
        return OneByOne(self, requests, params)


class OneByOne:
    """A `Generation` of one response at a time."""

    def __init__(self, engine: ScriptedEngine, requests: list[Request], params: SamplingParams) -> None:
        self._engine, self._left, self._params = engine, list(requests), params

    def take(self, min_tokens: int | None = None) -> list[Rollout]:
        return [self._engine._write(self._left.pop(0), self._params)]

    @property
    def is_taken(self) -> bool:
        return not self._left


def benchmark(folder: Path, engine: ScriptedEngine, weights: str = "w", **changes: Any) -> dict[str, Any]:
    """Run the scripted benchmark in `folder`/out."""
    path = folder / "sums.jsonl"
    rows = [{"problem": f"What is {n} + 0?", "answer": str(n)} for n in range(PROBLEMS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = BenchmarkConfig(files=[path], **{"samples": SAMPLES, "boxed_only": True, **changes})
    with Grader(num_workers=1) as grader:
        problems = load_benchmark(settings, grader)
        params = sampling(settings, LIMIT, 260)
        return run_benchmark(engine, engine.tokenizer, problems, settings, params, folder / "out", weights, grader)


if __name__ == "__main__":
    benchmark(Path(sys.argv[1]), StartingEngine(dies_after=5))
