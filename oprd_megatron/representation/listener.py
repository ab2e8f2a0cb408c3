"""The student's side of a chunk without a loss: its rows beside the teacher's, for whoever measures them.

Legend: P_local tokens of the pack on this rank; N supervised rows of this rank; D_S the student's width; C what travelled.
"""

from __future__ import annotations

import numpy as np
import torch

from oprd_megatron.parallel.grid import Grid
from oprd_megatron.representation.batch import Chunk
from oprd_megatron.representation.exchange import Delivery
from oprd_megatron.representation.rows import block_rows


class PairedRows:
    """Rows of one chunk on this rank; each row is on one rank of the layer's stage alone.

    Args:
        delivery: teacher states for this rank, received.
        chunk: of the batch.
        grid: the student's; this rank is on it.
        device: of the student's states.
    """

    def __init__(self, delivery: Delivery, chunk: Chunk, grid: Grid, device: torch.device) -> None:
        self.delivery, self.device = delivery, device
        self._rows = block_rows(chunk.student.tokens, chunk.route.order, grid, device)

    def of_student(self, micro_batch: int, hidden: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
        """(states [N, D_S] fp32, their token numbers in the chunk [N]) from hidden [P_local, 1, D_S]; N may be 0."""
        rows = self._rows.get(micro_batch)
        if rows is None:
            return hidden.new_empty(0, hidden.size(-1), dtype=torch.float32), np.arange(0)
        return hidden.detach().flatten(0, 1).index_select(0, rows.mine).float(), rows.own_tokens

    def of_teacher(self, micro_batch: int, teacher_layer: int, width: int) -> torch.Tensor:
        """What travelled of the same tokens' states: [N, width] fp32."""
        rows = self.delivery.rows(micro_batch, teacher_layer)
        if rows is None:
            return torch.empty(0, width, device=self.device)
        return self.delivery.wire.decode(rows.to(self.device))
