"""Linear layers whose weights are stored in fp8 and computed with in the model's dtype. For a frozen model, on any device.

A row's weights are cut into blocks of 32; a block is stored as 32 numbers of torch.float8_e4m3fn and one exponent:

    weight = number x 2^exponent        2^exponent: the least power of two that leaves the block's largest number at most 448

That is 1 + 1/32 bytes a weight, 0.516 of bf16. Why powers of two in blocks along a row: an e4m3 number has three bits
after its leading one wherever it lies between 2^-6 and 448, so finer or rounder scales make little difference to its error
(docs/fp8.md has the figures); number x 2^exponent is a bf16 number without a second rounding; and a block depends on nothing
outside of it, so that tensor-parallel ranks, each of which holds whole blocks, store what one rank alone would.

A layer's forward makes its weight in the model's dtype, multiplies, and lets go of it. There is no backward.

Legend: O rows, C columns of a matrix on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from oprd_megatron.models.norm import NormedRowParallelLinear
from oprd_megatron.parallel.precision import WEIGHT_BLOCK

FP8 = torch.float8_e4m3fn
ROWS_AT_ONCE = 1024
"""Rows that are quantised at a time, in fp32."""
BIAS = 127
"""An exponent e is stored as e + 127, as in a float32."""


def quantise(weight: torch.Tensor, block: int = WEIGHT_BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """[O, C] of any float dtype -> (numbers [O, C] e4m3, exponents [O, C / block] uint8)."""
    blocks = weight.float().unflatten(-1, (-1, block))
    largest = blocks.abs().amax(-1)
    fraction, exponent = torch.frexp(largest)  # largest = fraction x 2^exponent, fraction in [1/2, 1); 448 = 7/8 x 2^9
    exponent = exponent - 9 + (fraction > 0.875)
    stored = torch.where(largest > 0, exponent + BIAS, BIAS).clamp(1, 254)
    return (blocks / power_of_two(stored).unsqueeze(-1)).flatten(-2).to(FP8), stored.to(torch.uint8)


def dequantise(numbers: torch.Tensor, exponents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weights [O, C] in `dtype`, exact (above the smallest 2^-126)."""
    blocks = numbers.to(dtype).unflatten(-1, (exponents.size(-1), -1))
    return blocks.mul_(power_of_two(exponents).to(dtype).unsqueeze(-1)).flatten(-2)


def power_of_two(stored: torch.Tensor) -> torch.Tensor:
    """2^(stored - 127) in fp32, bit by bit: exact on every device."""
    return (stored.int() << 23).view(torch.float32)


class WeightOnly:
    """What the three linear layers below have in common: comes before mcore's class among the bases.

    Attributes:
        weight: [O, C] e4m3.
        exponents: [O, C / 32] uint8, a buffer: no parameter of the conversion tables.
    """

    weight: torch.nn.Parameter
    exponents: torch.Tensor

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        empty = torch.empty(self.weight.shape, dtype=FP8, device=self.weight.device)
        rows, columns = self.weight.shape
        self.weight = torch.nn.Parameter(empty, requires_grad=False)
        exponents = torch.empty(rows, columns // WEIGHT_BLOCK, dtype=torch.uint8, device=empty.device)
        self.register_buffer("exponents", exponents)  # type: ignore[attr-defined]

    @torch.no_grad()
    def store(self, weight: torch.Tensor) -> None:
        """Take this rank's whole matrix [O, C], quantised."""
        for first in range(0, len(weight), ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            self.weight[rows], self.exponents[rows] = quantise(weight[rows])

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        made = dequantise(weight, self.exponents, input.dtype)
        return super()._forward_impl(input, made, *arguments, **keywords)  # type: ignore[misc]


class WeightOnlyColumnParallelLinear(WeightOnly, ColumnParallelLinear):
    """Rows are split over tensor-parallel ranks."""


class WeightOnlyRowParallelLinear(WeightOnly, RowParallelLinear):
    """Columns are split over tensor-parallel ranks, in whole blocks."""


class WeightOnlyNormedRowParallelLinear(WeightOnly, NormedRowParallelLinear):
    """The same with a norm on what comes out."""


def weight_only_modules(chunks: list[Any]) -> list[WeightOnly]:
    """Layers of a rank's chunks whose weights are in fp8, in order."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, WeightOnly)]
