"""How the hidden states, and the logits, of two models differ.

Each token's state is a vector [D]. Its relative difference is |a - b| / |a|, norms over D; of a layer, that of its worst token.
By the token, because some tokens have states a thousand times larger than all others (attention sinks), which would hide the
rest; by the norm, because single channels are as large, and their rounding is no difference of the others'.

Legend: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import torch

ROWS_AT_A_TIME = 16
"""Of logits, which are compared in fp64."""


@dataclass(frozen=True)
class StateDifference:
    """Of the states after one unit (the embedding, a layer, the final norm, the head).

    Attributes:
        max_abs: largest difference of a value.
        relative: of the worst token.
        cosine: of the worst token.
    """

    max_abs: float = 0.0
    relative: float = 0.0
    cosine: float = 1.0

    def worse(self, other: StateDifference) -> StateDifference:
        """Of both."""
        return StateDifference(
            max(self.max_abs, other.max_abs), max(self.relative, other.relative), min(self.cosine, other.cosine)
        )


@dataclass(frozen=True)
class LogitsDifference:
    """Of the next-token distributions.

    Attributes:
        num_tokens: whose logits were compared.
        num_same_top: of these, with the same most likely token.
        kl: KL(A || B), mean over tokens, nats.
        max_kl: of the worst token.
    """

    num_tokens: int = 0
    num_same_top: int = 0
    kl: float = 0.0
    max_kl: float = 0.0

    @property
    def top1_agreement(self) -> float:
        return self.num_same_top / self.num_tokens if self.num_tokens else 1.0

    def joined(self, other: LogitsDifference) -> LogitsDifference:
        """Over the tokens of both."""
        count = self.num_tokens + other.num_tokens
        kl = (self.kl * self.num_tokens + other.kl * other.num_tokens) / max(count, 1)
        top = self.num_same_top + other.num_same_top
        return replace(self, num_tokens=count, num_same_top=top, kl=kl, max_kl=max(self.max_kl, other.max_kl))


def compare_states(a: torch.Tensor, b: torch.Tensor) -> StateDifference:
    """Of states [N, D] each. What is no number makes an infinite difference."""
    found = StateDifference()
    for mine, theirs in zip(a.split(ROWS_AT_A_TIME), b.split(ROWS_AT_A_TIME), strict=True):
        mine, theirs = mine.double(), theirs.double()
        apart = mine - theirs
        norm_a, norm_b = mine.norm(dim=-1), theirs.norm(dim=-1)
        relative = torch.where(apart.norm(dim=-1) == 0, 0.0, apart.norm(dim=-1) / norm_a)
        cosine = torch.where(norm_a + norm_b == 0, 1.0, (mine * theirs).sum(-1) / (norm_a * norm_b))
        found = found.worse(
            StateDifference(
                float(apart.abs().max().nan_to_num(torch.inf)),
                float(relative.max().nan_to_num(torch.inf)),
                min(1.0, float(cosine.min().nan_to_num(-1.0))),
            )
        )
    return found


def compare_logits(a: torch.Tensor, b: torch.Tensor) -> LogitsDifference:
    """Of logits [N, V] each."""
    found = LogitsDifference()
    for mine, theirs in zip(a.split(ROWS_AT_A_TIME), b.split(ROWS_AT_A_TIME), strict=True):
        log_p, log_q = (x.double().log_softmax(-1) for x in (mine, theirs))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).nan_to_num(torch.inf).clamp(min=0)
        same = int((mine.argmax(-1) == theirs.argmax(-1)).sum())
        found = found.joined(LogitsDifference(len(mine), same, float(kl.mean()), float(kl.max())))
    return found


class StateFile:
    """The first model's states, on disk until the second's are there: written one after the other, read in that order."""

    def __enter__(self) -> Self:
        self._file = tempfile.TemporaryFile()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, states: torch.Tensor) -> None:
        """fp32, of any shape."""
        self._file.write(states.contiguous().numpy().data)

    def rewind(self) -> None:
        """Read from the first on."""
        self._file.seek(0)

    def next_like(self, states: torch.Tensor) -> torch.Tensor:
        """The next one, which has the shape of `states`."""
        found = torch.empty_like(states)
        count = self._file.readinto(memoryview(found.numpy().data).cast("B"))
        assert count == found.nbytes, f"{count} bytes of states, not {found.nbytes}"
        return found
