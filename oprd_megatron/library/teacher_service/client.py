"""A trainer's end of a teacher service."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx
import numpy as np
import torch
from pydantic import ValidationError

from checkpoints_conversion.weights import check_weights
from oprd_megatron.bridge.artefact import read_info
from oprd_megatron.bridge.fingerprint import model_fingerprint, tokenizer_fingerprint
from oprd_megatron.config.distill import DistillConfig
from oprd_megatron.errors import ConfigError, DataError, UserError
from oprd_megatron.library.batches import TokenBatch
from oprd_megatron.library.student import is_first, told_by_first
from oprd_megatron.library.teacher_service.frames import CONTENT_TYPE, Question, ServiceInfo, unpack_answer
from oprd_megatron.library.teachers import HeldRows, Wanted
from oprd_megatron.parallel.agreement import together
from oprd_megatron.representation.layer_map import LayerPair
from oprd_megatron.rollout.tokenizer import load_tokenizer

CONNECT_SECONDS = 5.0
QUESTION_SHARE = 0.9
"""Of a frame, that states may fill: the rest is for its header."""


class TeacherClient:
    """Asks a teacher service for states.

    Args:
        url: http://host:port.
        seconds: longest wait for an answer.
        expected: Hugging Face directory of the teacher that the service should have, weights, settings and tokenizer; None
            takes whatever is there.

    Attributes:
        info: what the service says of itself.

    Raises:
        UserError: it cannot be reached, is not a teacher service, or has another teacher.
    """

    def __init__(self, url: str, seconds: float = 600.0, expected: Path | str | None = None) -> None:
        self.url = url.rstrip("/")
        timeout = httpx.Timeout(seconds, connect=CONNECT_SECONDS)
        self._client = httpx.Client(base_url=self.url, timeout=timeout, trust_env=False)
        try:
            self.info = ServiceInfo.model_validate_json(self._call("GET", "/v1/info"))
        except ValidationError:
            raise UserError(f"{self.url}: is not a teacher service of this version (format 1)") from None
        if expected is not None:
            self._check_teacher(Path(expected))

    def states(
        self, sequences: Sequence[np.ndarray], positions: Sequence[np.ndarray], layers: Sequence[int]
    ) -> dict[int, torch.Tensor]:
        """{layer: [P, C]} of these positions, sequence by sequence, in as many questions as frames are long.

        Raises:
            UserError: a refusal by the service, in its words, or no answer.
        """
        parts: list[dict[int, torch.Tensor]] = []
        for question in self._questions(sequences, positions, layers):
            question.check(self.info)
            frame = self._call("POST", "/v1/states", question.pack())
            try:
                parts.append(unpack_answer(frame, question, self.info))
            except DataError as error:
                raise DataError(f"{self.url}: {error}") from None
        if not parts:
            return {layer: torch.empty(0, self.info.width) for layer in layers}
        return {layer: torch.cat([part[layer] for part in parts]) for layer in layers}

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _questions(
        self, sequences: Sequence[np.ndarray], positions: Sequence[np.ndarray], layers: Sequence[int]
    ) -> list[Question]:
        """Sequences without a position are not asked about."""
        room, filled = int(QUESTION_SHARE * self.info.max_frame_bytes), 0
        groups: list[tuple[list[np.ndarray], list[np.ndarray]]] = []
        for ids, where in zip(sequences, positions, strict=True):
            if not len(where):
                continue
            one = Question([ids], [where], layers)
            size = max(one.answer_bytes(self.info), 8 * (len(ids) + len(where) + 2))
            if not groups or filled + size > room:
                groups.append(([], []))
                filled = 0
            groups[-1][0].append(ids)
            groups[-1][1].append(where)
            filled += size
        return [Question(ids, where, layers) for ids, where in groups]

    def _call(self, method: str, path: str, body: bytes | None = None) -> bytes:
        try:
            with self._client.stream(method, path, content=body, headers={"Content-Type": CONTENT_TYPE}) as response:
                return self._read(response, path)
        except httpx.TimeoutException:
            raise UserError(f"{self.url}: {path} did not answer in time; look at the service's output") from None
        except httpx.TransportError as error:
            raise UserError(
                f"{self.url}: {path}: {str(error) or type(error).__name__}; is the teacher service up?"
            ) from None

    def _read(self, response: httpx.Response, path: str) -> bytes:
        most = self.info.max_frame_bytes if path == "/v1/states" else 2**20
        body = bytearray()
        for piece in response.iter_bytes():
            body += piece
            if len(body) > most:
                raise UserError(
                    f"{self.url}: {path} sends more than the {most} bytes that it may; is this a teacher service?"
                )
        if response.status_code >= 400:
            raise UserError(f"{self.url}: {path} gave HTTP {response.status_code}: {_reason(bytes(body))}")
        return bytes(body)

    def _check_teacher(self, path: Path) -> None:
        difference = model_fingerprint(path, check_weights(path)).difference(self.info.teacher)
        if difference is None and tokenizer_fingerprint(load_tokenizer(path)) != self.info.tokenizer:
            difference = "tokenizer"
        if difference is not None:
            raise UserError(
                f"{self.url}: has the teacher {self.info.teacher.path}, which differs from {path} in its {difference}; start "
                "the service with this teacher, or expect that one"
            )


@dataclass(frozen=True)
class RemoteTeacher:
    """A teacher service as `attach` takes it. A replica's first rank asks for the states of its micro-batches and tells the
    others: through a bridge that is R numbers a state.

    Attributes:
        client: on every rank; only first ranks ask.
    """

    client: TeacherClient

    @classmethod
    def at(cls, url: str, expected: Path | str | None = None, seconds: float = 600.0) -> Self:
        """The service at an address; arguments as for `TeacherClient`."""
        return cls(TeacherClient(url, seconds, expected))

    @property
    def num_layers(self) -> int:
        return self.client.info.teacher.layers

    @property
    def width(self) -> int:
        return self.client.info.teacher.width

    def check(self, config: DistillConfig, pairs: Sequence[LayerPair]) -> None:
        info, url = self.client.info, self.client.url
        bridge = None if config.bridge is None else read_info(config.bridge)
        sha256 = bridge.sha256 if bridge else None
        if sha256 != info.bridge:
            has = "another bridge" if sha256 and info.bridge else "a bridge" if info.bridge else "no bridge"
            raise ConfigError(
                f"{url}: projects through {has}, distill.bridge is {config.bridge}; give both the same file"
            )
        if bridge is not None and bridge.rank - config.bridge_head != info.width:
            raise ConfigError(
                f"{url}: sends {info.width} numbers a state; give both the same distill.mode and bridge_head"
            )
        missing = sorted({pair.teacher_layer for pair in pairs} - set(info.layers))
        if missing:
            raise ConfigError(f"{url}: has no teacher layer {missing[0]}, only {', '.join(map(str, info.layers))}")
        if config.final_state != info.final_state:
            raise ConfigError(
                f"{url}: serves final_state {info.final_state}, but distill.final_state is {config.final_state}"
            )

    def deliver(self, wanted: Wanted, batches: Sequence[TokenBatch]) -> tuple[HeldRows, np.ndarray]:
        step, grid = wanted.step, wanted.grid
        layers = sorted({pair.teacher_layer for pair in wanted.pairs})
        mine = [number for number, dp in enumerate(step.dp) if dp == grid.coords.dp]
        states: dict[int, torch.Tensor] = {}
        with together(f"asking {self.client.url}"):
            if is_first(grid):
                sequences, positions = ([part[number] for number in mine] for part in (step.sequences, step.positions))
                states = self.client.states(sequences, positions, layers)
        tokens = np.flatnonzero(step.tokens.dp == grid.coords.dp)
        told = told_by_first(grid, states)
        return HeldRows.of(wanted, {k: v.float() for k, v in told.items()}, int(tokens[0]) if len(tokens) else 0)


def _reason(body: bytes) -> str:
    """What a refusal says, on one line."""
    try:
        said = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        said = body[:200].decode("utf-8", errors="replace")
    return " ".join(str(said).split())[:300] or "nothing"
