"""Finished responses on disk, so that a run that is killed does not generate again what it had.

Every response is appended, as it comes, to `folder/step_000012.rank0.jsonl` of the rank that took it. After a restart a request
is not asked again if its response is there: same step, sample index, weight version, prompt, sampling parameters and run
(`fingerprint`), in the file of any rank, because the layout may have changed.

Weights of steps after the checkpoint are computed again after a restart, and are equal only up to rounding (a GPU's sums
have no fixed order). So a response found here is one of the same version number, written by weights that differ in their
last bits: as far from the new ones as an engine's rounding is from the trainer's. The run is part of the fingerprint because
another learning rate, for example, would give that version other weights.

Lines are flushed, not synced: they outlive the process, not the machine. A process killed within a line leaves a torn
last one, which is skipped, and cut off before more is appended.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import torch

from oprd_megatron.config.schema import RunConfig
from oprd_megatron.errors import DataError
from oprd_megatron.rollout.engine import Generation, Request, Rollout, RolloutEngine, SamplingParams

FOLDER = "rollouts"
"""Name of the buffer in a run directory."""

WITHOUT_EFFECT: dict[str, Any] = {
    "run": {
        "dir",
        "stop_at",
        "time_limit_minutes",
        "time_margin_minutes",
        "micro_batch_size",
        "micro_batch_tokens",
        "device",
        "export",
    },
    "teacher": {"parallel"},
    "student": {"parallel", "recompute"},
    "rollout": {
        "num_engines": True,
        "batch_size": True,
        "probe_tolerance": True,
        "buffer": True,
        "vllm": {"tp", "gpu_memory_utilization", "enforce_eager", "cuda_graph_sizes"},
        "server": True,
    },
    "teachers": {"__all__": {"parallel"}},
    "checkpoint": True,
    "eval": True,
    "benchmark": True,
    "logging": True,
}
"""Settings that change neither weights nor text but for rounding; a run may be resumed with others."""


def run_fingerprint(config: RunConfig) -> str:
    """Of all settings that a version's weights depend on."""
    return _digest(config.model_dump(mode="json", exclude=WITHOUT_EFFECT))


def clear(folder: Path) -> None:
    """Delete all that is buffered: a run starts afresh. One rank does it before any engine is asked."""
    for path in folder.glob("step_*.rank*.jsonl"):
        path.unlink(missing_ok=True)


def forget(folder: Path, before_step: int) -> None:
    """Delete the responses, of all ranks, of steps below `before_step`: a checkpoint covers them. One rank does it."""
    for path in folder.glob("step_*.rank*.jsonl"):
        if int(path.name.split(".")[0].removeprefix("step_")) < before_step:
            path.unlink(missing_ok=True)


class BufferedEngine:
    """Any engine, with its responses kept on disk. Evaluation asks `engine` itself: its answers are not a step's.

    Args:
        engine: what writes. One with `start` (a `DecodingEngine`, `HFEngine`) is asked for responses as they finish; another
            gives, and keeps, all of a call at once.
        folder: of the buffer; made if it is not there.
        rank: this one, whose files are written.
        run: fingerprint of the run (`run_fingerprint`).
    """

    def __init__(self, engine: RolloutEngine, folder: Path, rank: int, run: str = "") -> None:
        self.engine, self.folder, self.rank, self.run = engine, folder, rank, run
        self.replica = engine.replica
        self._version: int | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def generate(self, requests: list[Request], params: SamplingParams, step: int) -> list[Rollout]:
        """One rollout per request, in their order: found on disk, or written now.

        Raises:
            DataError: a line of the buffer, not its last, is not a rollout.
        """
        rollouts = {rollout.sample_index: rollout for rollout in self.start(requests, params, step).take()}
        return [rollouts[request.sample_index] for request in requests]

    def start(self, requests: list[Request], params: SamplingParams, step: int) -> BufferedGeneration:
        """Begin to write what is not on disk.

        Raises:
            DataError: as `generate`.
        """
        key = _digest([asdict(params), self.run])
        found = self._found(requests, key, step)
        missing = [request for request in requests if request.sample_index not in found]
        rest: Generation | None = None
        if missing and isinstance(self.engine, _Starts):
            rest = self.engine.start(missing, params, step)
        elif missing:
            rest = _AtOnce(self.engine, missing, params, step)
        out = self.folder / f"step_{step:06d}.rank{self.rank}.jsonl"
        return BufferedGeneration(list(found.values()), rest, out, key)

    def update_weights(self, version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Pass them on, and note the version."""
        self._version = None
        self.engine.update_weights(version, tensors)
        self._version = version

    def score(self, token_ids: list[list[int]]) -> list[torch.Tensor]:
        """The engine's."""
        return self.engine.score(token_ids)

    def score_each(self, token_ids: list[list[int]]) -> dict[str, list[torch.Tensor]]:
        """The engine's."""
        return self.engine.score_each(token_ids)

    def checksums(self) -> dict[str, dict[str, int]]:
        """The engine's."""
        return self.engine.checksums()

    def close(self) -> None:
        """Close the engine. What is on disk stays."""
        self.engine.close()

    def forget(self, before_step: int) -> None:
        """See `forget` of this module."""
        forget(self.folder, before_step)

    def _found(self, requests: list[Request], key: str, step: int) -> dict[int, Rollout]:
        asked = {request.sample_index: request.prompt for request in requests}
        found: dict[int, Rollout] = {}
        for path in sorted(self.folder.glob(f"step_{step:06d}.rank*.jsonl")):
            for line in _whole_lines(path):
                prompt = asked.get(line["sample_index"])
                if prompt is None or line["key"] != key or line["weight_version"] != self._version:
                    continue
                if tuple(line["prompt_ids"]) == prompt.token_ids:
                    found[line["sample_index"]] = _rollout(line, prompt.index)
        return found


class BufferedGeneration:
    """A `Generation` whose responses are written down as they are taken.

    Args:
        found: on disk already.
        rest: of the engine; None if nothing is left to write.
        out: this rank's file of the step.
        key: of sampling and run.
    """

    def __init__(self, found: list[Rollout], rest: Generation | None, out: Path, key: str) -> None:
        self._found, self._rest, self._out, self._key = found, rest, out, key

    @property
    def is_taken(self) -> bool:
        """See `Generation.is_taken`."""
        return not self._found and (self._rest is None or self._rest.is_taken)

    def take(self, min_tokens: int | None = None) -> list[Rollout]:
        """See `Generation.take`. The engine is asked for any that is finished, again and again, so that each is on disk before
        the next is waited for."""
        taken, self._found = self._found, []
        tokens = _num_tokens(taken)
        if self._rest is not None and not self._rest.is_taken and (min_tokens is None or tokens < min_tokens):
            with _open_to_append(self._out) as file:
                while not self._rest.is_taken and (min_tokens is None or tokens < min_tokens):
                    new = self._rest.take(min_tokens=1)
                    file.write("".join(_line(rollout, self._key) for rollout in new).encode())
                    file.flush()
                    taken, tokens = taken + new, tokens + _num_tokens(new)
        return sorted(taken, key=lambda rollout: rollout.sample_index)


@runtime_checkable
class _Starts(Protocol):
    def start(self, requests: list[Request], params: SamplingParams, step: int) -> Generation: ...


class _AtOnce:
    """A `Generation` of an engine that gives all of a call at its end."""

    def __init__(self, engine: RolloutEngine, requests: list[Request], params: SamplingParams, step: int) -> None:
        self._engine, self._call, self.is_taken = engine, (requests, params, step), False

    def take(self, min_tokens: int | None = None) -> list[Rollout]:
        """All of it, once."""
        if self.is_taken:
            return []
        rollouts, self.is_taken = self._engine.generate(*self._call), True
        return rollouts


def _num_tokens(rollouts: list[Rollout]) -> int:
    return sum(len(rollout.response_ids) for rollout in rollouts)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


FIELDS = ("sample_index", "prompt_ids", "response_ids", "weight_version", "finished", "logprobs")


def _line(rollout: Rollout, key: str) -> str:
    return json.dumps({"key": key, **{name: getattr(rollout, name) for name in FIELDS}}) + "\n"


def _rollout(line: dict[str, Any], prompt_index: int) -> Rollout:
    lists = {
        name: None if line[name] is None else tuple(line[name]) for name in ("prompt_ids", "response_ids", "logprobs")
    }
    return Rollout(prompt_index, **{**{name: line[name] for name in FIELDS}, **lists})


def _open_to_append(path: Path) -> BinaryIO:
    """The file, without a torn last line."""
    file = path.open("a+b")
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if size and file.read() != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
    return file


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Lines as objects; what follows the last line's end is torn, and left out."""
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if not text.endswith(b"\n"):
                return
            try:
                line = json.loads(text)
                is_one = isinstance(line, dict) and line.keys() >= {"key", *FIELDS}
            except ValueError:
                is_one = False
            if not is_one:
                raise DataError(f"{path}:{number}: not a rollout; delete the file, and what it held is generated again")
            yield line
