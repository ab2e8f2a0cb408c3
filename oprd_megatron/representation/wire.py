"""The number format in which teacher states are kept and sent.

A state of D numbers becomes a row of `columns` numbers of `dtype`. fp32 and bf16 are plain casts. fp8 is e4m3 (3 bits of
mantissa) with one fp32 scale a state, chosen so that the state's largest number is e4m3's largest, 448: D + 4 bytes. Rounding
is then at most 2^-4 of each number that is not tiny; what it was is measured on every state (`relative_error`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from oprd_megatron.config.schema import DistillConfig

WireName = Literal["fp32", "bf16", "fp8"]
E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
SCALE_BYTES = 4


@dataclass(frozen=True)
class Wire:
    """A format for states of `width` numbers."""

    name: WireName
    width: int

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}[self.name]

    @property
    def columns(self) -> int:
        """Numbers of `dtype` in a row."""
        return self.width + (SCALE_BYTES if self.name == "fp8" else 0)

    @property
    def is_lossy(self) -> bool:
        """Whether rounding is coarse enough to be measured on every state."""
        return self.name == "fp8"

    @property
    def state_bytes(self) -> int:
        """Bytes of one state."""
        return self.columns * self.dtype.itemsize

    def encode(self, states: torch.Tensor) -> torch.Tensor:
        """[N, D] of any float dtype -> [N, columns]."""
        if self.name != "fp8":
            return states.to(self.dtype)
        scale = states.float().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / E4M3_MAX
        rounded = (states.float() / scale).to(torch.float8_e4m3fn)
        return torch.cat([rounded.view(torch.uint8), _own(scale).view(torch.uint8)], dim=-1)

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, columns] -> [N, D] fp32."""
        if self.name != "fp8":
            return rows.float()
        rounded = rows[:, : self.width].view(torch.float8_e4m3fn)
        return rounded.float() * _own(rows[:, self.width :]).view(torch.float32)

    def relative_error(self, states: torch.Tensor) -> torch.Tensor:
        """|decoded - state| / |state| of each state [N, D]: [N] fp32."""
        exact = states.float()
        return (self.decode(self.encode(states)) - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-30)


def _own(part: torch.Tensor) -> torch.Tensor:
    """A contiguous copy, aligned for any dtype. (`contiguous()` copies nothing of a single row, wherever it begins.)"""
    return part.clone(memory_format=torch.contiguous_format)


def wire_name(config: DistillConfig, teacher_dtype: Literal["fp32", "bf16"]) -> WireName:
    """The configured wire; `auto` is the teacher's dtype."""
    return teacher_dtype if config.wire == "auto" else config.wire
