"""Recorded rollouts as an engine: the answers of the file to the prompts of the run, or one line that says what is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from oprd_megatron.config import RunConfig, parse_config
from oprd_megatron.errors import ConfigError, DataError
from oprd_megatron.rollout import Prompt, Request, Rollout, SamplingParams, make_requests
from oprd_megatron.rollout.file_engine import FileEngine, check_recorded
from oprd_megatron.rollout.recorded import RolloutWriter
from oprd_megatron.rollout.recorded_row import Recorded
from tests.training.runs import changed

PROMPTS = [Prompt(3, "three", (1, 2)), Prompt(8, "eight", (5,))]
PARAMS = SamplingParams(max_response_tokens=4, vocab_size=100)
STEPS, PER_STEP = 3, 4


def rollout(step: int, request: Request) -> Rollout:
    ids = (10 * step + request.sample_index, 7)
    prompt = request.prompt
    return Rollout(prompt.index, request.sample_index, prompt.token_ids, ids, 40 + step, step != 1, (-0.5, -0.25))


def record(path: Path, **changes: Any) -> Path:
    """The run's steps, backwards and with samples out of order; `changes` are made to step 1, sample 2."""
    with RolloutWriter(path) as writer:
        for step in reversed(range(STEPS)):
            for request in reversed(make_requests(PROMPTS, 2)):
                row = Recorded.of(rollout(step, request), step, request.prompt.text, "")
                writer.write(replace(row, **changes) if (step, request.sample_index) == (1, 2) else row)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_answers_are_those_of_the_file(tmp_path: Path, suffix: str) -> None:
    """For any part of a step's requests in any order and any order of steps; with the recorded version and
    log-probabilities."""
    engine, requests = FileEngine(record(tmp_path / f"r{suffix}")), make_requests(PROMPTS, 2)
    for step in (2, 0, 1):
        assert engine.generate(requests, PARAMS, step) == [rollout(step, request) for request in requests]
    some = [requests[3], requests[0]]
    assert engine.generate(some, PARAMS, 1) == [rollout(1, request) for request in some]
    assert engine.generate([], PARAMS, 0) == []


@pytest.mark.parametrize("changes, message", [
    ({"prompt_ids": (1, 3)}, r"answers another prompt \('eight'\) than this run's \('eight'\); record it with"),
    ({"response_ids": (99, 100)}, "has token id 100, but the models share only ids below 100"),
    ({"response_ids": (1,) * 5, "logprobs": None}, "has 5 response tokens, more than rollout.max_response_tokens 4"),
    ({"sample_index": 9}, "is not there; record more steps with `oprd rollout --steps`"),
])  # fmt: skip
def test_what_does_not_fit_the_run_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """The message names file, step and sample; other steps and samples still work."""
    engine, requests = FileEngine(record(tmp_path / "r.jsonl", **changes)), make_requests(PROMPTS, 2)
    with pytest.raises(DataError, match=rf"r\.jsonl: step 1, sample 2 {message}") as caught:
        engine.generate(requests, PARAMS, 1)
    assert "\n" not in str(caught.value)
    assert len(engine.generate(requests, PARAMS, 0)) == PER_STEP
    assert len(engine.generate(requests[:2], PARAMS, 1)) == 2


def test_without_a_limit_any_id_is_taken(tmp_path: Path) -> None:
    """vocab_size None means all."""
    engine = FileEngine(record(tmp_path / "r.jsonl", response_ids=(99, 10**6)))
    params = replace(PARAMS, vocab_size=None)
    assert engine.generate(make_requests(PROMPTS, 2), params, 1)[2].response_ids == (99, 10**6)


def test_weights_pass_by_and_cannot_be_scored(tmp_path: Path) -> None:
    """The stream is used up, since making it may be collective; a probe is one line."""
    engine, stream = FileEngine(record(tmp_path / "r.jsonl")), iter([("a", torch.zeros(1)), ("b", torch.zeros(1))])
    engine.update_weights(4, stream)
    assert list(stream) == []
    assert engine.generate(make_requests(PROMPTS, 2), PARAMS, 0)[0].weight_version == 40
    for scores in (engine.score, engine.score_each):
        with pytest.raises(ConfigError, match=r"rollout\.engine: .*r\.jsonl holds recorded rollouts and no weights"):
            scores([[1, 2]])
    assert engine.checksums() == {}
    engine.close()


def config(values: dict[str, Any], steps: int = STEPS, prompts: int = 2, responses: int = 2) -> RunConfig:
    section = {"prompts_per_step": prompts, "responses_per_prompt": responses}
    return parse_config(changed(values, run={"steps": steps}, rollout=section), "test")


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_run_that_the_file_is_long_enough_for_passes(values: dict[str, Any], tmp_path: Path, suffix: str) -> None:
    """Exactly, with steps to spare, and with every id below the vocabulary's size; what is short is said with figures."""
    path = record(tmp_path / f"r{suffix}")  # ids up to 23
    for steps in (STEPS, 1):
        check_recorded(config(values, steps), path, vocab_size=24)
    with pytest.raises(DataError, match="has token id 23, but the models share only ids below 23"):
        check_recorded(config(values), path, vocab_size=23)
    short = (r"has 12 responses of 3 steps, and step 3 has 0 of 4; run\.steps 5 needs 5 x 2 x 2 responses: record more with "
             r"`oprd rollout --steps 5`, or set run\.steps=3")  # fmt: skip
    with pytest.raises(DataError, match=short):
        check_recorded(config(values, steps=5), path, 24)
    with pytest.raises(DataError, match=r"step 0 has 4 of 6; run\.steps 3 needs 3 x 2 x 3 responses"):
        check_recorded(config(values, responses=3), path, 24)
    with pytest.raises(DataError, match=r"has a sample_index [23], but a step of this run has 1 x 2 responses"):
        check_recorded(config(values, prompts=1), path, 24)
    with pytest.raises(DataError, match="step 1 has a sample_index 4, but a step of this run has 2 x 2 responses"):
        check_recorded(config(values), record(tmp_path / f"more{suffix}", sample_index=4), 24)
    gap = record(tmp_path / f"gap{suffix}", step=7)
    check_recorded(config(values, steps=1), gap, 24)
    with pytest.raises(DataError, match=r"step 1 has 3 of 4; .*, or set run\.steps=1$"):
        check_recorded(config(values), gap, 24)


def test_token_columns_are_not_read_before_the_run(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of parquet only step and sample_index; ids are known by the file's statistics."""
    path, read = record(tmp_path / "r.parquet"), []
    for name in ("read", "iter_batches", "read_row_group"):
        method = getattr(pq.ParquetFile, name)

        def watched(self: Any, *args: Any, method: Any = method, columns: Any = None, **kwargs: Any) -> Any:
            read.append(columns)
            return method(self, *args, columns=columns, **kwargs)

        monkeypatch.setattr(pq.ParquetFile, name, watched)
    with pytest.raises(DataError, match="token id 23"):
        check_recorded(config(values), path, 20)
    assert read == [["step", "sample_index"]]
    table = pq.ParquetFile(path).read()
    pq.write_table(table, tmp_path / "bare.parquet", write_statistics=False)
    check_recorded(config(values), tmp_path / "bare.parquet", 20)  # then each step's rows tell, as they are read
    engine = FileEngine(tmp_path / "bare.parquet")
    with pytest.raises(DataError, match="step 2, sample 0 has token id 20"):
        engine.generate(make_requests(PROMPTS, 2), replace(PARAMS, vocab_size=20), 2)
