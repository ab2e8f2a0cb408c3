"""A global batch of rollouts, and everything about it that both models must agree on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.errors import DataError
from oprd_megatron.parallel import GridLayout
from oprd_megatron.representation.layer_map import LayerPair
from oprd_megatron.representation.placement import Arrangement, TokenPlacement, arrange, place_tokens
from oprd_megatron.representation.positions import supervised_positions
from oprd_megatron.representation.route import Transfer, plan_route

PAD_ID = 0
"""What right padding is filled with; it is never attended to by a real token and never supervised."""


@dataclass(frozen=True)
class Sample:
    """Token ids of one rollout; both models read the same ids."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.response_ids


@dataclass(frozen=True)
class Side:
    """One model's arrangement of the batch."""

    arrangement: Arrangement
    tokens: TokenPlacement


@dataclass(frozen=True)
class BatchPlan:
    """What every rank computes alike about one global batch.

    Attributes:
        samples: the rollouts, in order.
        num_tokens: supervised tokens of the whole batch: the loss's global denominator.
        teacher, student: either model's arrangement.
        transfers: the routing plan.
    """

    samples: Sequence[Sample]
    num_tokens: int
    teacher: Side
    student: Side
    transfers: list[Transfer]


def plan_batch(
    samples: Sequence[Sample],
    pairs: Sequence[LayerPair],
    teacher: GridLayout,
    student: GridLayout,
    config: DistillConfig,
    micro_batch_size: int,
) -> BatchPlan:
    """Arrange a global batch on both grids and route its states.

    Raises:
        DataError: no token of the batch is supervised.
    """
    lengths = [len(sample.ids) for sample in samples]
    positions = [supervised_positions(len(s.prompt_ids), len(s.response_ids), config) for s in samples]
    num_tokens = sum(len(sample_positions) for sample_positions in positions)
    if num_tokens == 0:
        raise DataError("no token of this batch is supervised: all responses are empty; check rollout.stop and prompts")
    sides = []
    for layout in (teacher, student):
        arrangement = arrange(lengths, layout, micro_batch_size)
        sides.append(Side(arrangement, place_tokens(positions, arrangement, layout)))
    transfers = plan_route(pairs, teacher, sides[0].tokens, student, sides[1].tokens)
    return BatchPlan(samples, num_tokens, sides[0], sides[1], transfers)


def token_blocks(samples: Sequence[Sample], arrangement: Arrangement, dp: int) -> list[torch.Tensor]:
    """Token ids of each micro-batch of one data-parallel rank: [B, S] int64, right-padded with `PAD_ID`."""
    blocks = []
    for columns, length in zip(arrangement.samples[dp], arrangement.lengths[dp], strict=True):
        block = torch.full((len(columns), length), PAD_ID)
        for row, sample in enumerate(columns):
            ids = samples[sample].ids
            block[row, : len(ids)] = torch.tensor(ids)
        blocks.append(block)
    return blocks
