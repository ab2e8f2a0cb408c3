"""Messages between neighbouring pipeline stages, for packs of different lengths and any number of virtual stages.

mcore's own communicator asks for the shape of what it is about to receive, and waits for all shapes before it
sends anything else. In an interleaved schedule one stage can then wait for a gradient's shape from a stage that waits
for this stage's activation. Here nobody asks: every rank knows the lengths of all micro-batches and the order of the schedule.

With two stages and virtual pipeline stages the previous and the next rank are one. Messages between two ranks of a group match
the order in which they are posted, and the two ends do not post activations and gradients in the same order (one may still
fill the pipeline while the other already alternates). So what goes forward and what goes backward have a group each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.transformer.transformer_config import TransformerConfig

from oprd_megatron.parallel.activity import here
from oprd_megatron.parallel.grid import Grid


class PackP2P(P2PCommunicator):
    """mcore's communicator with its one primitive replaced; good for one pass over some micro-batches.

    Args:
        grid: of the model; this rank is on it.
        config: of the model.
        lengths: tokens of each micro-batch on this rank, P_local.
    """

    def __init__(self, grid: Grid, config: TransformerConfig, lengths: Sequence[int]) -> None:
        super().__init__(grid.groups.pp, config)
        self.backward_group = grid.pp_backward
        layout, stage = grid.layout, grid.coords.pp
        group_size = config.microbatch_group_size_per_vp_stage if layout.vpp > 1 else len(lengths)
        table = get_schedule_table(len(lengths), layout.vpp, group_size)
        within = [lengths[number] for number, _ in table]
        around = [
            lengths[number] for number, chunk in table if chunk < layout.vpp - 1
        ]  # from the last stage to the first
        self._forward = iter(around if stage == 0 else within)
        self._backward = iter(around if stage == layout.pp - 1 else within)

    def _communicate(  # type: ignore[no-untyped-def]
        self, *, tensor_send_next, tensor_send_prev, recv_prev, recv_next, tensor_shape, wait_on_reqs=True
    ):
        """Returns (received from the previous stage, received from the next, None); blocks until done."""
        assert wait_on_reqs, "overlapped pipeline communication is not used"
        from_prev, forward = self._operations(
            tensor_send_next, self.next_rank, recv_prev, self.prev_rank, self.pp_group
        )
        from_next, backward = self._operations(
            tensor_send_prev, self.prev_rank, recv_next, self.next_rank, self.backward_group
        )
        works = [
            work for operations in (forward, backward) if operations for work in dist.batch_isend_irecv(operations)
        ]
        with here.waiting():
            for work in works:
                work.wait()
        return from_prev, from_next, None

    def _operations(
        self, sent: torch.Tensor | None, to: int, receives: bool, source: int, group: dist.ProcessGroup
    ) -> tuple[torch.Tensor | None, list[dist.P2POp]]:
        """What one direction receives [P_local, 1, D], and its messages."""
        received, operations = None, []
        if sent is not None:
            operations.append(dist.P2POp(dist.isend, sent.detach().contiguous(), to, group))
        if receives:
            lengths: Iterator[int] = self._forward if group is self.pp_group else self._backward
            shape, device = (next(lengths), 1, self.config.hidden_size), torch.cuda.current_device()
            received = torch.empty(shape, dtype=self.config.pipeline_dtype, device=device, requires_grad=True)
            operations.append(dist.P2POp(dist.irecv, received.detach(), source, group))
        return received, operations
