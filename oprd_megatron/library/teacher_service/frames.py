"""What crosses the wire between a trainer and a teacher service: safetensors, and nothing else.

    GET  /v1/info      -> JSON, `ServiceInfo`
    POST /v1/states    question -> answer, both one safetensors file as the body

    question    ids [sum of lengths], lengths [n], positions [P], counts [n], layers [L]; int64
                sequence i has lengths[i] ids, and counts[i] of the positions, ascending, 0-based
    answer      layer.<number> [P, C] for each layer, in the order of the positions; fp32 or bf16; C is the bridge's rank, or
                the teacher's width without one

A refusal is JSON {"error": one line} with a status of 400 or above. Nothing that is received is ever unpickled, and both sides
say how long a frame may be before they read it.

Legend: n sequences, P positions of all of them, L layers, C numbers of a state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load, save

from oprd_megatron.bridge.fingerprint import ModelFingerprint, Sha256
from oprd_megatron.errors import DataError

FORMAT: Literal[1] = 1
CONTENT_TYPE = "application/vnd.safetensors"
MAX_FRAME_BYTES = 256 * 2**20
PARTS = ("ids", "lengths", "positions", "counts", "layers")


class ServiceInfo(BaseModel):
    """Which teacher a service has, and what it makes of its states."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1] = FORMAT
    teacher: ModelFingerprint
    tokenizer: Sha256
    final_state: Literal["post_norm", "pre_norm"]
    layers: list[PositiveInt]
    """Teacher layers that can be asked for."""
    bridge: Sha256 | None
    """sha256 of the bridge that projects the states; None: they come as they are."""
    width: PositiveInt
    """C."""
    dtype: Literal["fp32", "bf16"]
    context: PositiveInt
    """Longest sequence."""
    max_frame_bytes: PositiveInt


@dataclass(frozen=True)
class Question:
    """Sequences to score.

    Attributes:
        sequences: ids of each; int64.
        positions: of each, ascending.
        layers: of the teacher, 1-based.
    """

    sequences: Sequence[np.ndarray]
    positions: Sequence[np.ndarray]
    layers: Sequence[int]

    @property
    def num_states(self) -> int:
        """P."""
        return sum(map(len, self.positions))

    def parts(self) -> dict[str, torch.Tensor]:
        """By their names in a frame."""
        whole = {
            "ids": _joined(self.sequences), "lengths": [len(ids) for ids in self.sequences],
            "positions": _joined(self.positions), "counts": [len(where) for where in self.positions],
            "layers": list(self.layers),
        }  # fmt: skip
        return {name: torch.as_tensor(values, dtype=torch.int64) for name, values in whole.items()}

    def pack(self) -> bytes:
        """One frame."""
        return save(self.parts())

    @classmethod
    def unpack(cls, frame: bytes, info: ServiceInfo) -> Question:
        """Read and check a frame from a stranger.

        Raises:
            DataError: it is not one, or asks for what this teacher does not have.
        """
        parts = _read(frame, "the question")
        if set(parts) != set(PARTS) or any(part.dtype != torch.int64 or part.ndim != 1 for part in parts.values()):
            raise DataError(f"the question must hold {', '.join(PARTS)}, each int64 of one dimension")
        ids, lengths, positions, counts, layers = (parts[name].numpy() for name in PARTS)
        sizes_fit = len(lengths) == len(counts) and all(
            bool(((sizes >= least) & (sizes <= len(values))).all())
            for sizes, values, least in ((lengths, ids, 1), (counts, positions, 0))
        )
        if not len(layers) or not len(lengths) or not sizes_fit:
            raise DataError(
                "the question needs a layer and a sequence; lengths and counts belong to sequences, one each"
            )
        if lengths.sum() != len(ids) or counts.sum() != len(positions):
            raise DataError(
                f"lengths add up to {lengths.sum()} of {len(ids)} ids, counts to {counts.sum()} of {len(positions)}"
            )
        question = cls(_cut(ids, lengths), _cut(positions, counts), layers.tolist())
        question.check(info)
        return question

    def check(self, info: ServiceInfo) -> None:
        """Raises:
        DataError: a token, length, position or layer that this teacher does not have, or too long an answer.
        """
        missing = sorted(set(self.layers) - set(info.layers))
        if missing:
            raise DataError(f"teacher layer {missing[0]} cannot be had here, only {', '.join(map(str, info.layers))}")
        if len(set(self.layers)) < len(self.layers):
            raise DataError(f"layers {list(self.layers)}: one is named twice")
        for number, (ids, where) in enumerate(zip(self.sequences, self.positions, strict=True)):
            if len(ids) > info.context:
                raise DataError(f"sequence {number} has {len(ids)} tokens, the teacher's context is {info.context}")
            if ids.min() < 0 or ids.max() >= info.teacher.vocab:
                bad = int(ids.min() if ids.min() < 0 else ids.max())
                raise DataError(f"token id {bad} is not one of the teacher's {info.teacher.vocab}: another tokenizer")
            if len(where) and (where[0] < 0 or where[-1] >= len(ids) or (np.diff(where) <= 0).any()):
                raise DataError(f"positions of sequence {number} are not ascending within its {len(ids)} tokens")
        if self.answer_bytes(info) > info.max_frame_bytes:
            raise DataError(
                f"the answer would have {self.answer_bytes(info)} bytes, more than the {info.max_frame_bytes} of a frame; ask "
                "for fewer sequences at a time"
            )

    def answer_bytes(self, info: ServiceInfo) -> int:
        """Of the answer's states."""
        return self.num_states * len(self.layers) * info.width * (4 if info.dtype == "fp32" else 2)


def pack_answer(states: Mapping[int, torch.Tensor]) -> bytes:
    """{layer: [P, C]} as a frame."""
    return save({f"layer.{layer}": rows.cpu().contiguous() for layer, rows in states.items()})


def unpack_answer(frame: bytes, question: Question, info: ServiceInfo) -> dict[int, torch.Tensor]:
    """{layer: [P, C]} of a frame.

    Raises:
        DataError: it is not an answer to this question.
    """
    parts, dtype = _read(frame, "the answer"), {"fp32": torch.float32, "bf16": torch.bfloat16}[info.dtype]
    shape = [question.num_states, info.width]
    for layer in question.layers:
        found = parts.get(f"layer.{layer}")
        if found is None or found.dtype != dtype or list(found.shape) != shape:
            has = "nothing" if found is None else f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
            raise DataError(f"the answer has {has} for layer {layer}, not {info.dtype} {shape}")
        if not bool(torch.isfinite(found).all()):
            raise DataError(f"the answer's layer {layer} holds numbers that are not finite")
    return {layer: parts[f"layer.{layer}"] for layer in question.layers}


def _read(frame: bytes, what: str) -> dict[str, torch.Tensor]:
    try:
        return load(frame)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise DataError(f"{what} is not a safetensors frame ({str(error)[:80]})") from None


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def _cut(values: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(sizes)[:-1])
