"""The buffer of finished responses: what a killed run had is not generated again, and nothing that is not its own is used."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from oprd_megatron.config import parse_config
from oprd_megatron.errors import DataError, WeightSyncError
from oprd_megatron.rollout import HFEngine, Prompt, Request, Rollout, SamplingParams, make_requests
from oprd_megatron.rollout.buffer import BufferedEngine, clear, forget, run_fingerprint
from tests.rollout.test_hf_engine import weights_of
from tests.tiny_models import tiny_hf_model
from tests.training.runs import changed, with_layout

PROMPTS = [Prompt(10 + index, "", (70 + index, 7)) for index in range(4)]
REQUESTS = make_requests(PROMPTS, 3)
PARAMS = SamplingParams(max_response_tokens=8, seed=3)
STEP = 12


def answer(request: Request, version: int, step: int = STEP) -> Rollout:
    """Of one to four tokens, of everything that a response depends on."""
    sample, prompt = request.sample_index, request.prompt
    ids = tuple(100 + step + sample + index for index in range(1 + sample % 4))
    logprobs = None if sample % 5 == 4 else tuple(-0.1 * index for index in range(len(ids)))
    return Rollout(prompt.index, sample, prompt.token_ids, ids, version, sample % 3 > 0, logprobs)


class AllAtOnce:
    """An engine without `start`. `asked` has the sample indices of each call."""

    replica: int | None = None

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.version = -1

    def generate(self, requests: list[Request], params: SamplingParams, step: int) -> list[Rollout]:
        self.asked.append([request.sample_index for request in requests])
        return [answer(request, self.version, step) for request in requests]

    def update_weights(self, version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        if list(tensors):
            raise WeightSyncError("no such weights")
        self.version = version

    def score(self, token_ids: list[list[int]]) -> list[torch.Tensor]:
        return [torch.zeros(len(ids) - 1) for ids in token_ids]

    def score_each(self, token_ids: list[list[int]]) -> dict[str, list[torch.Tensor]]:
        return {"one": self.score(token_ids)}

    def checksums(self) -> dict[str, dict[str, int]]:
        return {"one": {"w": 3}}

    def close(self) -> None:
        self.version = -2


class OneByOne(AllAtOnce):
    """An engine whose responses finish one after the other, the last first. `written` has their sample indices."""

    def __init__(self, log: Path | None = None) -> None:
        super().__init__()
        self.written: list[int] = []
        self.log = log

    def start(self, requests: list[Request], params: SamplingParams, step: int) -> OneByOneGeneration:
        self.asked.append([request.sample_index for request in requests])
        return OneByOneGeneration(self, requests, step)


class OneByOneGeneration:
    def __init__(self, engine: OneByOne, requests: list[Request], step: int) -> None:
        self.engine, self.left, self.step, self.version = engine, list(requests), step, engine.version

    @property
    def is_taken(self) -> bool:
        return not self.left

    def take(self, min_tokens: int | None = None) -> list[Rollout]:
        taken: list[Rollout] = []
        while self.left and (min_tokens is None or sum(len(r.response_ids) for r in taken) < min_tokens):
            if self.engine.log is not None:
                time.sleep(0.02)
            taken.append(answer(self.left.pop(), self.version, self.step))
            self.engine.written.append(taken[-1].sample_index)
            if self.engine.log is not None:
                with self.engine.log.open("a") as file:
                    file.write(f"{taken[-1].sample_index}\n")
        return sorted(taken, key=lambda rollout: rollout.sample_index)


def life(folder: Path, engine: AllAtOnce, version: int = 5, rank: int = 0, run: str = "run") -> BufferedEngine:
    buffered = BufferedEngine(engine, folder, rank, run)
    buffered.update_weights(version, iter([]))
    return buffered


def expected(version: int = 5, step: int = STEP) -> list[Rollout]:
    return [answer(request, version, step) for request in REQUESTS]


@pytest.mark.parametrize("kind", [AllAtOnce, OneByOne])
def test_a_finished_step_is_not_written_again(tmp_path: Path, kind: type[AllAtOnce]) -> None:
    """Not a request reaches the engine of the second life; responses are those of the first, in the requests' order."""
    first, second = kind(), kind()
    assert life(tmp_path, first).generate(REQUESTS, PARAMS, STEP) == expected()
    assert [path.name for path in tmp_path.iterdir()] == ["step_000012.rank0.jsonl"]
    assert life(tmp_path, second).generate(REQUESTS[::-1], PARAMS, STEP) == expected()[::-1]
    assert first.asked == [[request.sample_index for request in REQUESTS]]
    assert second.asked == []
    assert life(tmp_path, second).generate([], PARAMS, STEP) == []


def child(folder: Path, log: Path) -> None:
    life(folder, OneByOne(log)).generate(REQUESTS, PARAMS, STEP)


def test_a_run_that_is_killed_again_and_again_writes_every_response_once(tmp_path: Path) -> None:
    """kill -9 after one to three more responses, until all are there. What the buffer had when a process died is never written
    again; only the response that was on its way may be. The last life gives all, in order, once each."""
    folder, log = tmp_path / "rollouts", tmp_path / "written.txt"
    context, times = multiprocessing.get_context("fork"), (1, 3, 2)
    file = folder / "step_000012.rank0.jsonl"
    for more in times:
        before = sample_indices(file)
        process = context.Process(target=child, args=(folder, log))
        process.start()
        deadline = time.monotonic() + 60
        while len(sample_indices(file)) < len(before) + more:
            assert time.monotonic() < deadline and process.is_alive()
            time.sleep(0.002)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    kept = sample_indices(file)
    assert 6 <= len(kept) < len(REQUESTS) and len(set(kept)) == len(kept)
    last = OneByOne()
    assert life(folder, last).generate(REQUESTS, PARAMS, STEP) == expected()
    assert sorted(kept + last.written) == list(range(len(REQUESTS)))
    assert 0 <= len(log.read_text().split()) - len(kept) <= len(times)  # written, but not kept
    assert sorted(sample_indices(file)) == list(range(len(REQUESTS)))


def sample_indices(path: Path) -> list[int]:
    """Of a buffer file's whole lines."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line)["sample_index"] for line in lines]


def test_a_line_that_is_torn_anywhere_is_written_again(tmp_path: Path) -> None:
    """The file cut at every byte of its last line: the other responses are found, that one is written, and the third life
    finds a file in which every line is whole."""
    life(tmp_path / "whole", OneByOne()).generate(REQUESTS[:3], PARAMS, STEP)
    whole = (tmp_path / "whole" / "step_000012.rank0.jsonl").read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for cut in range(last, len(whole) + 1):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "step_000012.rank0.jsonl").write_bytes(whole[:cut])
        second, third = OneByOne(), OneByOne()
        assert life(folder, second).generate(REQUESTS[:3], PARAMS, STEP) == expected()[:3]
        assert second.written == ([] if cut == len(whole) else [0])  # responses finish the last first
        assert life(folder, third).generate(REQUESTS[:3], PARAMS, STEP) == expected()[:3]
        assert third.asked == []
        assert (folder / "step_000012.rank0.jsonl").read_bytes() == whole


def test_another_rank_torn_line_is_left_alone(tmp_path: Path) -> None:
    """Its owner may be about to finish it."""
    life(tmp_path, OneByOne(), rank=1).generate(REQUESTS[:3], PARAMS, STEP)
    other = tmp_path / "step_000012.rank1.jsonl"
    other.write_bytes(other.read_bytes()[:-9])
    torn, engine = other.read_bytes(), OneByOne()
    assert life(tmp_path, engine, rank=0).generate(REQUESTS, PARAMS, STEP) == expected()
    assert sorted(engine.written) == [0, *range(3, 12)]
    assert other.read_bytes() == torn


def test_the_layout_may_change(tmp_path: Path) -> None:
    """Three ranks wrote; of two, each finds what it is now asked for in the files of all."""
    for rank in range(3):
        life(tmp_path, OneByOne(), rank=rank).generate(REQUESTS[rank::3], PARAMS, STEP)
    for rank in range(2):
        engine = OneByOne()
        assert life(tmp_path, engine, rank=rank).generate(REQUESTS[rank::2], PARAMS, STEP) == expected()[rank::2]
        assert engine.asked == []


def test_what_is_not_the_same_is_written_again(tmp_path: Path) -> None:
    """Another version of the weights, sampling, prompt, step or run; and afterwards both are there."""
    life(tmp_path, OneByOne()).generate(REQUESTS, PARAMS, STEP)
    others = [replace(request, prompt=replace(request.prompt, token_ids=(1, 2, 3))) for request in REQUESTS]
    changes: list[tuple[dict[str, Any], list[Request], SamplingParams, int]] = [
        ({"version": 6}, REQUESTS, PARAMS, STEP),
        ({"run": "another"}, REQUESTS, PARAMS, STEP),
        ({}, others, PARAMS, STEP),
        ({}, REQUESTS, PARAMS, STEP + 1),
        *(({}, REQUESTS, replace(PARAMS, **change), STEP) for change in (
            {"temperature": 0.5}, {"top_p": 0.5}, {"max_response_tokens": 9}, {"stop": ("x",)}, {"seed": 4}, {"vocab_size": 99},
        )),
    ]  # fmt: skip
    for settings, requests, params, step in changes:
        for asked in ([[request.sample_index for request in REQUESTS]], []):
            engine = OneByOne()
            rollouts = life(tmp_path, engine, **settings).generate(requests, params, step)
            assert rollouts == [answer(request, settings.get("version", 5), step) for request in requests]
            assert engine.asked == asked, (settings, params, step)
    untouched = OneByOne()
    assert life(tmp_path, untouched).generate(REQUESTS, PARAMS, STEP) == expected()
    assert untouched.asked == []


def test_a_rollout_gets_the_index_that_its_prompt_has_now(tmp_path: Path) -> None:
    """Which row of the file a prompt is may change when rows are left out; its ids say that it is the same."""
    life(tmp_path, OneByOne()).generate(REQUESTS, PARAMS, STEP)
    moved = [replace(request, prompt=replace(request.prompt, index=request.prompt.index + 5)) for request in REQUESTS]
    rollouts = life(tmp_path, OneByOne()).generate(moved, PARAMS, STEP)
    assert [rollout.prompt_index for rollout in rollouts] == [request.prompt.index for request in moved]


def test_responses_are_on_disk_before_the_next_is_waited_for(tmp_path: Path) -> None:
    """Also those of a take that asks for many tokens, and of one that asks for all."""
    for name, min_tokens in (("many", 9), ("all", None)):
        engine, folder = OneByOne(), tmp_path / name
        seen: list[tuple[int, int]] = []
        generation = life(folder, engine).start(REQUESTS, PARAMS, STEP)
        rest = generation._rest
        assert isinstance(rest, OneByOneGeneration)
        take = rest.take

        def watched(min_tokens: int | None = None, take: Any = take, folder: Path = folder, seen: Any = seen,
                    engine: OneByOne = engine) -> list[Rollout]:  # fmt: skip
            seen.append((len(sample_indices(folder / "step_000012.rank0.jsonl")), len(engine.written)))
            return take(min_tokens)

        rest.take = watched  # type: ignore[method-assign]
        generation.take(min_tokens)
        assert len(seen) >= 3 and all(on_disk == written for on_disk, written in seen)


def test_taking_in_parts(tmp_path: Path) -> None:
    """What was found counts: a first take that it is enough for waits for nothing. Later ones wait for as many tokens as asked;
    each response comes once, each take in the order of sample indices; after the last there is nothing."""
    life(tmp_path, OneByOne()).generate(REQUESTS[:4], PARAMS, STEP)  # 1 + 2 + 3 + 4 tokens
    engine = OneByOne()
    generation = life(tmp_path, engine).start(REQUESTS, PARAMS, STEP)
    assert generation.take(10) == expected()[:4] and engine.written == [] and not generation.is_taken
    assert generation.take(6) == expected()[10:] and engine.written == [11, 10]  # 4 + 3 tokens
    assert generation.take(1) == expected()[9:10]
    assert generation.take() == expected()[4:9] and generation.is_taken
    assert generation.take() == generation.take(5) == []
    generation = life(tmp_path, engine).start(REQUESTS, PARAMS, STEP)
    assert not generation.is_taken
    assert generation.take(1) == expected() and generation.is_taken  # all that is there


def test_an_update_that_fails_leaves_no_version(tmp_path: Path) -> None:
    """Nothing is found then, and the engine says why it does not write."""
    engine = OneByOne()
    buffered = life(tmp_path, engine)
    buffered.generate(REQUESTS, PARAMS, STEP)
    with pytest.raises(WeightSyncError):
        buffered.update_weights(6, iter([("x", torch.zeros(1))]))
    buffered.generate(REQUESTS, PARAMS, STEP)
    assert len(engine.asked) == 2
    assert [len(scores) for scores in buffered.score([[1, 2, 3]])] == [2]
    assert list(buffered.score_each([[1, 2, 3]])) == ["one"] and buffered.checksums() == {"one": {"w": 3}}
    buffered.close()
    assert engine.version == -2


def test_old_steps_are_forgotten(tmp_path: Path) -> None:
    """Those that a checkpoint covers, of all ranks; a fresh start forgets all; other files stay."""
    (tmp_path / "notes.txt").write_text("mine")
    for step in (9, 12, 1_000_000):
        for rank in (0, 11):
            life(tmp_path, OneByOne(), rank=rank).generate(REQUESTS, PARAMS, step)
            clear(tmp_path / "nowhere")
    life(tmp_path, OneByOne()).forget(before_step=12)
    steps = sorted(path.name for path in tmp_path.iterdir())
    assert steps == ["notes.txt", "step_000012.rank0.jsonl", "step_1000000.rank0.jsonl"]
    forget(tmp_path, before_step=13)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step_1000000.rank0.jsonl"]
    clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"key": 1}', '"\\ud800"', "NaN"])
def test_a_file_with_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    """A whole line that is no rollout is not what a kill leaves: file and line, and what to do."""
    life(tmp_path, OneByOne()).generate(REQUESTS[:3], PARAMS, STEP)
    path = tmp_path / "step_000012.rank0.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    with pytest.raises(DataError, match=r"step_000012\.rank0\.jsonl:2: not a rollout; delete the file") as caught:
        life(tmp_path, OneByOne()).generate(REQUESTS, PARAMS, STEP)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    hf_dir = tmp_path_factory.mktemp("llama")
    return hf_dir, tiny_hf_model("llama", hf_dir, num_layers=2)


def test_the_embedded_engine_keeps_every_batch(tmp_path: Path, llama: tuple[Path, PreTrainedModel]) -> None:
    """Killed after two batches of three, it decodes only the other prompts; what it gives is what it gives without a buffer, to
    the last bit of a log-probability where the batch is the same."""

    def engine() -> HFEngine:
        made = HFEngine(llama[0], torch.float32, "cpu", batch_size=3)
        made.update_weights(5, weights_of(llama[1]))
        return made

    whole = engine().generate(REQUESTS, PARAMS, STEP)
    first = BufferedEngine(engine(), tmp_path, 0)
    first.update_weights(5, weights_of(llama[1]))
    generation = first.start(REQUESTS, PARAMS, STEP)
    assert len(generation.take(1) + generation.take(1)) == 6
    del generation
    second = BufferedEngine(engine(), tmp_path, 0)
    second.update_weights(5, weights_of(llama[1]))
    decoded: list[int] = []
    generate_batch = second.engine._generate_batch  # type: ignore[attr-defined]

    def watched(requests: list[Request], *args: Any) -> list[Rollout]:
        decoded.extend(request.sample_index for request in requests)
        return generate_batch(requests, *args)

    second.engine._generate_batch = watched  # type: ignore[attr-defined]
    assert second.generate(REQUESTS, PARAMS, STEP) == whole
    assert decoded == [6, 7, 8, 9, 10, 11]


def test_the_run_is_what_weights_depend_on(values: dict[str, Any]) -> None:
    """Learning rate, loss, models, text and steps are part of it; layout, logging, checkpoints and where it runs are not."""
    one = run_fingerprint(parse_config(values, "test"))
    same = [
        with_layout(values, dp=2),
        changed(values, run={"dir": "elsewhere", "stop_at": 2, "micro_batch_size": 4}),
        changed(values, rollout={"batch_size": 3, "num_engines": 1}),
        changed(values, eval={"every": 1}),
        changed(values, logging={"tensorboard": True}),
        {**values, "checkpoint": {"every": 1}},
    ]
    assert {run_fingerprint(parse_config(other, "test")) for other in same} == {one}
    others = [
        changed(values, run={"steps": 4}),
        changed(values, run={"seed": 6}),
        changed(values, optimizer={"lr": 2e-3}),
        changed(values, rollout={"truncated": "drop"}),
        changed(values, rollout={"prompts_per_step": 2}),
        changed(values, teacher={"path": "elsewhere"}),
        changed(values, student={"dtype": "bf16"}),
        {**values, "distill": {"position_anchor": "predictor"}},
        {**values, "recipe": "oprd_plus_opd"},
    ]
    found = [run_fingerprint(parse_config(other, "test")) for other in others]
    assert len({one, *found}) == len(others) + 1
