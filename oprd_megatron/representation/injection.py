"""The loss where the layer lives: each tapped student layer adds its share of Eq. 6 on its own pipeline stage.

mcore's schedule knows one loss, on the last stage. A representation loss has a term on every supervised layer, most of
them on other stages. So each tap passes its hidden state through `InjectRowLoss`, an identity whose backward adds the
gradient of that layer's loss to the gradient that comes from above. Nothing else about the schedule changes:
several micro-batches in flight, uneven stages and mcore's early freeing of stage outputs work, and no hidden state of all
layers is ever stored. (The pattern is mcore's own, for the auxiliary losses of mixture-of-experts layers.)

Only supervised rows are touched, and only they are cast to fp32. The gradient of the rows is computed in backward from the
hidden state, which autograd keeps alive for the next layer anyway.

Tensor parallelism: with sequence parallelism each rank holds rows of its own and the result is local. Without it the
hidden state is replicated and every rank must end up with the whole gradient, but each computes only its share of the
rows (so that it needs only 1/tp of the targets): backward all-gathers the shares, one collective per tapped layer
and micro-batch.

Legend: S_local tokens and B samples of the block on this rank; D width; N supervised rows of this rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import make_viewless_tensor

from oprd_megatron.parallel import Grid
from oprd_megatron.representation.exchange import Targets
from oprd_megatron.representation.layer_map import LayerPair
from oprd_megatron.representation.loss import (
    ALIGNMENT_FIELDS,
    LossScale,
    Normalize,
    alignment_sums,
    row_loss,
)
from oprd_megatron.representation.placement import TokenPlacement
from oprd_megatron.representation.rows import BlockRows, block_rows, gather_rows


class InjectRowLoss(torch.autograd.Function):
    """Identity on the hidden state; backward adds weight * d row_loss / d hidden at the supervised rows.

    Forward: no collectives. Backward: one all-gather over `tp_group` if the rows are replicated, else none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        target: torch.Tensor,
        rows: BlockRows,
        weight: float,
        how: Normalize,
        tp_group: dist.ProcessGroup,
    ) -> torch.Tensor:
        """hidden [S_local, B, D]; target [N, D], any float dtype."""
        ctx.save_for_backward(hidden, target)
        ctx.rows, ctx.weight, ctx.how, ctx.tp_group = rows, weight, how, tp_group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None]:  # type: ignore[override]
        hidden, target = ctx.saved_tensors
        selected = hidden.detach().flatten(0, 1).index_select(0, ctx.rows.mine).float().requires_grad_()
        with torch.enable_grad():
            loss = ctx.weight * row_loss(selected, target.float(), ctx.how)
        (row_gradient,) = torch.autograd.grad(loss, selected)
        rows, row_gradient = ctx.rows.mine, row_gradient.to(gradient.dtype)
        if ctx.rows.replicated:
            rows, row_gradient = torch.cat(ctx.rows.by_rank), gather_rows(row_gradient, ctx.rows.by_rank, ctx.tp_group)
        total = gradient.clone(memory_format=torch.contiguous_format)
        total.view(-1, total.size(-1)).index_add_(0, rows, row_gradient)
        return total, None, None, None, None, None


class Aligner:
    """The student's side of one global batch: `on_state` is its tap, `metrics` what it measured.

    Args:
        pairs: supervised layers.
        targets: teacher states for this rank, from the exchange.
        tokens: where the supervised tokens lie on the student's grid.
        grid: the student's grid.
        scale: what turns sums of rows into the loss.
        how: normalisation.
        device: of the hidden states.
    """

    def __init__(
        self,
        pairs: Sequence[LayerPair],
        targets: Targets,
        tokens: TokenPlacement,
        grid: Grid,
        *,
        scale: LossScale,
        how: Normalize,
        device: torch.device,
    ) -> None:
        self.teacher_layer = {pair.student_layer: pair.teacher_layer for pair in pairs}
        self.targets, self.scale, self.how = targets, scale, how
        self.tp_group = grid.groups.tp
        self.rows = block_rows(tokens, grid, device)
        self._sums: dict[tuple[int, int], torch.Tensor] = {}

    def on_state(self, layer: int, micro_batch: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """Measure the layer's loss and, when training, inject its gradient. hidden: [S_local, B, D]."""
        rows = self.rows.get(micro_batch)
        if rows is None:
            return None
        target = self.targets.rows(micro_batch, self.teacher_layer[layer])
        if target is None:
            target = hidden.new_empty(0, hidden.size(-1))
        selected = hidden.detach().flatten(0, 1).index_select(0, rows.mine).float()
        self._sums[micro_batch, layer] = alignment_sums(selected, target.float(), self.how)
        if not torch.is_grad_enabled():
            return None
        injected = InjectRowLoss.apply(hidden, target, rows, self.scale.weight, self.how, self.tp_group)
        # The schedule frees a stage's output by replacing its data, which it refuses to do to a view.
        return make_viewless_tensor(injected, requires_grad=True, keep_graph=True)

    def sums(self) -> dict[int, torch.Tensor]:
        """{student layer: [len(ALIGNMENT_FIELDS)] float64 sums over this rank's rows}. Adding them over the ranks of the
        student's grid counts every row once."""
        totals: dict[int, torch.Tensor] = defaultdict(lambda: torch.zeros(len(ALIGNMENT_FIELDS), dtype=torch.float64))
        for (_, layer), value in self._sums.items():
            totals[layer] = totals[layer] + value.cpu()
        return dict(totals)
