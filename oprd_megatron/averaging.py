"""A teacher that follows its student slowly (`teacher.ema_decay`), for self-distillation: after every update

    teacher <- decay * teacher + (1 - decay) * student

Both models lie alike, so every rank moves its own share and nothing travels. The average is kept in fp32, whatever the teacher
computes in: in bf16 a step of 1 - decay would round to nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from oprd_megatron.models import Model


class AveragedTeacher:
    """The teacher's weights as an average of the student's.

    Args:
        teacher, student: of one architecture, on equal grids.
        decay: what is kept of the average in a step.
    """

    def __init__(self, teacher: Model, student: Model, decay: float) -> None:
        self.teacher, self.student, self.decay = teacher, student, decay
        self.average = [
            {name: parameter.detach().float().clone() for name, parameter in chunk.named_parameters()}
            for chunk in teacher.chunks
        ]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the student as it is now."""
        for average, chunk in zip(self.average, self.student.chunks, strict=True):
            weights = dict(chunk.named_parameters())
            for name, value in average.items():
                value.lerp_(weights[name].float(), 1 - self.decay)
        self._tell_teacher()

    def sharded_state(self) -> dict[str, Any]:
        """The average as mcore's sharded tensors: {"teacher0": {..}, ..} for a checkpoint in any layout."""
        state = {}
        for number, (chunk, average) in enumerate(zip(self.teacher.chunks, self.average, strict=True)):
            tensors = {}
            for name, value in chunk.sharded_state_dict(prefix="teacher.").items():
                if isinstance(value, ShardedTensor):
                    mine = average[name.removeprefix("teacher.")]
                    tensors[name] = replace(value, data=mine, dtype=mine.dtype)
                elif isinstance(value, ShardedTensorFactory):  # gate and up of an MLP, in one weight
                    tensors[name] = replace(value, data=average[name.removeprefix("teacher.")])
            state[f"teacher{number}"] = tensors
        return state

    @torch.no_grad()
    def load(self, loaded: dict[str, Any]) -> None:
        """Go on from what `sharded_state` was loaded with."""
        for number, average in enumerate(self.average):
            for name, value in loaded[f"teacher{number}"].items():
                average[name.removeprefix("teacher.")].copy_(value)
        self._tell_teacher()

    @torch.no_grad()
    def _tell_teacher(self) -> None:
        for average, chunk in zip(self.average, self.teacher.chunks, strict=True):
            for name, parameter in chunk.named_parameters():
                parameter.copy_(average[name])
