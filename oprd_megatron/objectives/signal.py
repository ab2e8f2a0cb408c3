"""What the teacher's last stage makes of its final states before they travel (`representation/outputs.py` says which is used).

Legend: P_local tokens of the pack on this rank; D_T the teacher's width; C numbers that travel of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from oprd_megatron.config.output import Term
from oprd_megatron.models import Model
from oprd_megatron.objectives.fused_terms import summarize
from oprd_megatron.representation.batch import Chunk, Sample
from oprd_megatron.representation.outputs import output_wire
from oprd_megatron.representation.rows import block_rows, selected_rows
from oprd_megatron.representation.wire import Wire

OnHidden = Callable[[int, torch.Tensor], torch.Tensor]


class TeacherStates:
    """Final states travel; `predicted` says of which response tokens."""

    def __init__(self, teacher: Model, predicted: Callable[[Sample], Sequence[int]]) -> None:
        self.wire: Wire | None = Wire("bf16" if teacher.config.bf16 else "fp32", teacher.architecture.hidden_size)
        self.predicted = predicted

    def of_teacher(self, chunk: Chunk) -> OnHidden:
        """The final states as they are."""
        return lambda micro_batch, hidden: hidden


class TeacherColumns:
    """What the terms read travels; the teacher's head is applied where it lives.

    Args:
        teacher: the model.
        terms: that read few numbers of it.
        predicted: response tokens of a sample.
        vocab_size: ids that both models have.
        chunk_tokens: tokens whose logits exist at a time.
        device: of the states.
    """

    def __init__(
        self,
        teacher: Model,
        terms: Sequence[Term],
        predicted: Callable[[Sample], Sequence[int]],
        vocab_size: int,
        chunk_tokens: int,
        device: torch.device,
    ) -> None:
        self.teacher, self.terms, self.predicted = teacher, terms, predicted
        self.vocab_size, self.chunk_tokens, self.device = vocab_size, chunk_tokens, device
        self.wire: Wire | None = output_wire(terms, "teacher", "fp32", 0)

    def of_teacher(self, chunk: Chunk) -> OnHidden:
        """Columns [P_local, 1, C] fp32, of the supervised rows; 0 elsewhere. Collective over the tensor-parallel group."""
        outputs, grid = chunk.outputs, self.teacher.grid
        assert outputs is not None and outputs.teacher is not None and self.wire is not None
        blocks, width = block_rows(outputs.teacher, outputs.order, grid, self.device), self.wire.width

        def columns(micro_batch: int, hidden: torch.Tensor) -> torch.Tensor:
            found = hidden.new_zeros(hidden.size(0), hidden.size(1), width, dtype=torch.float32)
            if micro_batch in blocks:
                rows, group = blocks[micro_batch], grid.groups.tp
                states = selected_rows(hidden.detach(), rows, group)
                targets = torch.from_numpy(outputs.targets[rows.tokens]).to(self.device)
                made = summarize(
                    states, self.teacher.head_weight, targets, self.terms, self.vocab_size, group, self.chunk_tokens
                )
                parts = made.split([len(of_rank) for of_rank in rows.by_rank])
                places = range(len(parts)) if rows.replicated else [group.rank()]
                for rank in places:
                    found[rows.by_rank[rank], 0] = parts[rank]
            return found

        return columns
