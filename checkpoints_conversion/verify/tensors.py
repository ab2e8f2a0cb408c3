"""Every tensor of two models, value by value, in blocks: memory does not depend on the models.

Where the dtypes differ (a conversion with `--dtype`), both are rounded to the coarser one: a conversion that rounded, and did
nothing else, leaves no difference then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from checkpoints_conversion.convert.casting import cast
from checkpoints_conversion.files.dtypes import ITEMSIZE
from checkpoints_conversion.files.messages import shown
from checkpoints_conversion.files.source import TensorSource
from checkpoints_conversion.verify.sides import Side
from oprd_megatron.errors import CheckpointError

BLOCK_BYTES = 4 * 2**20
FINENESS = ("F64", "F32", "F16", "BF16")
"""From many bits of precision to few."""


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that is not the same.

    Attributes:
        name: under Hugging Face.
        what: which kind of difference.
        detail: shapes, for a difference of shape.
        num_values: of the tensor.
        num_differing: of its values.
        max_abs: largest difference.
        relative: norm of the difference by the norm of A's tensor.
    """

    name: str
    what: Literal["only in A", "only in B", "in neither", "shape", "values"]
    detail: str = ""
    num_values: int = 0
    num_differing: int = 0
    max_abs: float = 0.0
    relative: float = 0.0


@dataclass
class TensorComparison:
    """What came out.

    Attributes:
        num_tensors: that both have, of one shape.
        num_bitwise: of these, equal to the bit.
        num_rounded: of these, of other dtypes and equal once rounded to the coarser one.
        rounding: pairs of dtypes of the latter.
        differences: the rest, and what only one side has; in the order of the model.
        compute_dtypes: for each name, the coarser of both dtypes.
    """

    num_tensors: int = 0
    num_bitwise: int = 0
    num_rounded: int = 0
    rounding: set[tuple[str, str]] = field(default_factory=set)
    differences: list[TensorDifference] = field(default_factory=list)
    compute_dtypes: dict[str, str] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether both sides have every tensor of their model, in the right shape."""
        return all(difference.what == "values" for difference in self.differences)


def compare_tensors(a: Side, b: Side, advance: Callable[[int], None]) -> TensorComparison:
    """Compare all tensors.

    Args:
        a, b: the models.
        advance: told how many bytes of A were compared.
    """
    found = TensorComparison()
    in_order = list(a.expected | b.expected)
    others = sorted((a.names | b.names) - set(in_order))
    for name in in_order + others:
        if name not in a.names or name not in b.names:
            where: Literal["only in A", "only in B", "in neither"] = (
                "only in A" if name in a.names else "only in B" if name in b.names else "in neither"
            )
            found.differences.append(TensorDifference(name, where))
            continue
        shapes = a.source.shape(name), b.source.shape(name)
        if shapes[0] != shapes[1] or shapes[0] != a.expected.get(name, shapes[0]):
            implied = a.expected.get(name, b.expected.get(name))
            detail = f"{list(shapes[0])} and {list(shapes[1])}, config.json implies {list(implied or ())}"
            found.differences.append(TensorDifference(name, "shape", detail))
            continue
        for side in (a, b):
            if side.source.dtype(name) not in FINENESS:
                raise CheckpointError(
                    f"{side.source.file_of(name)}: {shown(name)} is {side.source.dtype(name)}, which is no dtype of a weight; "
                    "verify the model before it is quantised"
                )
        _compare_one(name, a.source, b.source, found)
        advance(math.prod(shapes[0]) * ITEMSIZE[a.source.dtype(name)])
    return found


def coarser(a: str, b: str) -> str:
    """The dtype of the two with fewer bits of precision."""
    return max(a, b, key=FINENESS.index)


def _compare_one(name: str, a: TensorSource, b: TensorSource, found: TensorComparison) -> None:
    dtypes = a.dtype(name), b.dtype(name)
    found.num_tensors += 1
    found.compute_dtypes[name] = dtype = coarser(*dtypes)
    if all(bytes_a == bytes_b for bytes_a, bytes_b in _blocks(name, a, b, dtype)):
        if dtypes[0] == dtypes[1]:
            found.num_bitwise += 1
        else:
            found.num_rounded += 1
            found.rounding.add(dtypes)
        return
    difference = _measure(name, a, b, dtype)
    if difference.num_differing:
        found.differences.append(difference)
    else:
        found.num_rounded += 1  # zeros of another sign


def _blocks(name: str, a: TensorSource, b: TensorSource, dtype: str) -> Iterator[tuple[memoryview, memoryview]]:
    """The same rows of both, rounded to `dtype`; valid until the next."""
    shape = a.shape(name)
    rows, width = (shape[0] if shape else 1), math.prod(shape[1:])
    count = max(1, BLOCK_BYTES // max(1, width * ITEMSIZE["F32"]))
    buffers = [np.empty(min(rows, count) * width * ITEMSIZE[side.dtype(name)], np.uint8) for side in (a, b)]
    for first in range(0, rows, count):
        some = min(count, rows - first)
        pair = []
        for side, buffer in zip((a, b), buffers, strict=True):
            stored = side.dtype(name)
            block = buffer[: some * width * ITEMSIZE[stored]].data
            side.read_into(name, first, some, None, block)
            pair.append(cast(block, stored, dtype))
        yield pair[0], pair[1]


def _measure(name: str, a: TensorSource, b: TensorSource, dtype: str) -> TensorDifference:
    num_values = num_differing = 0
    max_abs = squares = squares_of_a = 0.0
    for block_a, block_b in _blocks(name, a, b, dtype):
        mine, theirs = (np.frombuffer(cast(block, dtype, "F64"), np.float64) for block in (block_a, block_b))
        with np.errstate(invalid="ignore"):
            apart = np.abs(mine - theirs)
        apart[np.isnan(mine) & np.isnan(theirs) | (mine == theirs)] = 0.0  # infinities of one sign are equal
        apart[np.isnan(apart)] = np.inf
        num_values += apart.size
        num_differing += int(np.count_nonzero(apart))
        max_abs = max(max_abs, float(apart.max(initial=0.0)))
        squares += float(np.square(apart).sum())
        squares_of_a += float(np.square(mine).sum())
    relative = math.sqrt(squares / squares_of_a) if squares_of_a > 0 else math.inf
    return TensorDifference(name, "values", "", num_values, num_differing, max_abs, relative)
