"""The loss where the layer lives: each tapped student layer adds its share of Eq. 6 on its own pipeline stage.

mcore's schedule knows one loss, on the last stage. A representation loss has a term on every supervised layer, most of
them on other stages. So each tap passes its hidden state through `InjectRowLoss`, an identity whose backward adds the
gradient of that layer's loss to the gradient that comes from above. Nothing else about the schedule changes:
several micro-batches in flight, virtual and uneven stages, recomputation and mcore's early freeing of stage outputs work, and
no hidden state of all layers is ever stored. (The pattern is mcore's own, for the auxiliary losses of
mixture-of-experts layers.)

Only supervised rows are touched, and only they are cast to fp32. The gradient of the rows is computed in backward from the
hidden state, which autograd keeps alive for the next layer anyway.

Tensor parallelism: with sequence parallelism each rank holds rows of its own and the result is local. Without it the
hidden state is replicated and every rank must end up with the whole gradient, but each computes only its share of the
rows (so that it needs only 1/tp of the targets): backward all-gathers the shares, one collective per tapped layer
and micro-batch.

Legend: P_local tokens of the pack on this rank; D width; N supervised rows of this rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core.utils import make_viewless_tensor
from torch.nn.functional import cosine_similarity

from oprd_megatron.parallel.grid import Grid
from oprd_megatron.representation.layer_map import LayerPair
from oprd_megatron.representation.loss import (
    ALIGNMENT_FIELDS,
    LossScale,
    Normalize,
    alignment_sums,
    row_loss,
)
from oprd_megatron.representation.placement import TokenPlacement
from oprd_megatron.representation.rows import block_rows, gather_rows
from oprd_megatron.representation.space import Space
from oprd_megatron.representation.wire import Wire


class Delivered(Protocol):
    """Teacher states for this rank, as they travelled: a `Delivery` that has been waited for, or somebody else's.

    Attributes:
        wire: their format.
    """

    wire: Wire

    def rows(self, micro_batch: int, teacher_layer: int) -> torch.Tensor | None:
        """The targets [N, C] of `block_rows`; None where this rank supervises no token of the micro-batch."""
        ...

    def release(self, micro_batch: int, teacher_layer: int) -> None:
        """They are not needed again."""
        ...


class InjectRowLoss(torch.autograd.Function):
    """Identity on the hidden state; backward adds weight * d row_loss / d hidden at the supervised rows, and gives the
    layer's trained map, if it has one, the gradient of this rank's rows.

    Forward: no collectives. Backward: one all-gather over the tensor-parallel group if the rows are replicated, else none.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, trained: torch.Tensor | None, aligner: Aligner, layer: int, micro_batch: int
    ) -> torch.Tensor:
        """hidden [P_local, 1, D]; trained: the layer's map, only so that autograd asks for its gradient."""
        ctx.save_for_backward(hidden)
        ctx.aligner, ctx.place = aligner, (layer, micro_batch)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (hidden,) = ctx.saved_tensors
        rows, row_gradient, of_trained = ctx.aligner.gradients(*ctx.place, hidden)
        total = gradient.clone(memory_format=torch.contiguous_format)
        total.view(-1, total.size(-1)).index_add_(0, rows, row_gradient.to(gradient.dtype))
        return total, of_trained, None, None, None


class Aligner:
    """The student's side of one chunk: `on_state` is its tap, `sums` what it measured.

    Args:
        pairs: supervised layers.
        delivery: teacher states for this rank, received.
        tokens: where the supervised tokens lie on the student's grid.
        order: of this rank's rows (`Route.order`).
        grid: the student's grid.
        scale: what turns sums of rows into the loss.
        how: normalisation.
        device: of the hidden states.
        space: in which states are compared.
        on_cosines: called once for each layer and micro-batch with (token numbers [N], cosines [N]).
    """

    def __init__(
        self,
        pairs: Sequence[LayerPair],
        delivery: Delivered,
        tokens: TokenPlacement,
        order: np.ndarray,
        grid: Grid,
        *,
        scale: LossScale,
        how: Normalize,
        device: torch.device,
        space: Space,
        on_cosines: Callable[[np.ndarray, torch.Tensor], None] | None = None,
    ) -> None:
        self.on_cosines = on_cosines
        self.teacher_layer = {pair.student_layer: pair.teacher_layer for pair in pairs}
        self.delivery, self.scale, self.how, self.space = delivery, scale, how, space
        self.tp_group = grid.groups.tp
        self.rows = block_rows(tokens, order, grid, device)
        here = set(grid.layout.layers_of(grid.coords.pp))
        taught: dict[int, set[int]] = defaultdict(set)
        for pair in pairs:
            if pair.student_layer in here:
                taught[pair.teacher_layer].add(pair.student_layer)
        self._waiting = {(mb, layer): set(students) for mb in self.rows for layer, students in taught.items()}
        self._sums: dict[tuple[int, int], torch.Tensor] = {}

    def on_state(self, layer: int, micro_batch: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """Measure the layer's loss and, when training, inject its gradient. hidden: [P_local, 1, D].

        A layer that is recomputed in backward comes here twice: first without gradients, where it is measured, then with.
        """
        rows = self.rows.get(micro_batch)
        if rows is None:
            return None
        if (micro_batch, layer) not in self._sums:
            states = hidden.detach().flatten(0, 1).index_select(0, rows.mine).float()
            with torch.no_grad():
                compared = self.space.of_student(layer, states)
            target = self._target(layer, micro_batch, compared)
            inside = self.space.inside(layer, states)
            self._sums[micro_batch, layer] = alignment_sums(compared, target, self.how, inside)
            if self.on_cosines:
                self.on_cosines(rows.own_tokens, cosine_similarity(compared, target, dim=-1))
        if not torch.is_grad_enabled():
            return None
        injected = InjectRowLoss.apply(hidden, self.space.trained(layer), self, layer, micro_batch)
        # The schedule frees a stage's output by replacing its data, which it refuses to do to a view.
        return make_viewless_tensor(injected, requires_grad=True, keep_graph=True)

    def gradients(
        self, layer: int, micro_batch: int, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Rows of the local block, the loss's gradient there, and that of the layer's trained map: ([N] int64, [N, D] fp32,
        [D_T, D] or None). Frees the target if nobody else needs it. Collective over the tensor-parallel group where the rows
        are replicated."""
        rows, trained = self.rows[micro_batch], self.space.trained(layer)
        selected = hidden.detach().flatten(0, 1).index_select(0, rows.mine).float().requires_grad_()
        with torch.enable_grad():
            compared = self.space.of_student(layer, selected)
            target = self._target(layer, micro_batch, compared)
            loss = self.scale.weight(layer) * row_loss(compared, target, self.how)
        gradient, *of_trained = torch.autograd.grad(loss, [selected] if trained is None else [selected, trained])
        teacher_layer = self.teacher_layer[layer]
        waiting = self._waiting[micro_batch, teacher_layer]
        waiting.discard(layer)
        if not waiting:
            self.delivery.release(micro_batch, teacher_layer)
        map_gradient = of_trained[0] if of_trained else None
        if not rows.replicated:
            return rows.mine, gradient, map_gradient
        wire = hidden.dtype  # what the gradient will be added to: nothing is gained by gathering more digits
        gathered = gather_rows(gradient.to(wire), rows.by_rank, self.tp_group)
        return torch.cat(rows.by_rank), gathered, map_gradient

    def _target(self, layer: int, micro_batch: int, like: torch.Tensor) -> torch.Tensor:
        rows = self.delivery.rows(micro_batch, self.teacher_layer[layer])
        return like.new_empty(0, like.size(-1)) if rows is None else self.delivery.wire.decode(rows.to(like.device))

    def sums(self) -> dict[int, torch.Tensor]:
        """{student layer: [len(ALIGNMENT_FIELDS)] float64 sums over this rank's rows}. Adding them over the ranks of the
        student's grid counts every row once."""
        totals: dict[int, torch.Tensor] = defaultdict(lambda: torch.zeros(len(ALIGNMENT_FIELDS), dtype=torch.float64))
        for (_, layer), value in self._sums.items():
            totals[layer] = totals[layer] + value.cpu()
        return dict(totals)
