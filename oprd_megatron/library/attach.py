"""OPRD inside a loop somebody already has: `attach` to the student once, and say before each step what it will read.

    teacher = InProcessTeacher.load("/models/Qwen3-8B", ParallelConfig(tp=2), platform=select_platform())
    oprd = attach(model, teacher, DistillConfig(positions="all"))
    forward_backward = oprd.around(get_forward_backward_func())         # the rest of the loop stays as it is

Each supervised layer of the student gets a hook that injects the layer's own gradient on its own stage, the code that the
project's trainer uses (`representation/injection.py`). The loop's own loss is not touched: gradients add up.

What mcore does to gradients between the loss and the optimizer, and what the injected ones are therefore multiplied by, so
that in the end they are those of Eq. 6 with one global denominator M (supervised tokens of all micro-batches and ranks):

    config.calculate_per_token_loss   loss_func returns        mcore                                        factor
    False                             2 or 3 values            averages over dp x cp ranks                  dp * cp / M
    True                              (loss, tokens, metrics)  adds up, divides by all ranks' tokens N      N / M
    True                              (loss, metrics)          adds up                                      1 / M

The schedule's division by the number of micro-batches concerns the returned loss alone. `config.grad_scale_func` (fp16) is
applied as mcore applies it to the loss.

Which micro-batch a hook sees: a chunk of a model goes through micro-batches in order, forward and, in mcore's schedules, also
when layers are recomputed in backward; so calls are counted, with and without gradients apart.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import get_model_config

from oprd_megatron.config.distill import DistillConfig
from oprd_megatron.config.schedule import weight_at
from oprd_megatron.errors import ConfigError, DataError
from oprd_megatron.library.batches import Step, TokenBatch, megatron_batch
from oprd_megatron.library.student import grid_of, is_first, told_by_first, unwrapped
from oprd_megatron.library.teachers import Teacher, Wanted
from oprd_megatron.platform import select_platform
from oprd_megatron.representation.alignment import AlignmentReport, reduce_sums
from oprd_megatron.representation.injection import Aligner
from oprd_megatron.representation.layer_map import resolve_layer_pairs
from oprd_megatron.representation.layer_weights import layer_weights
from oprd_megatron.representation.loss import LossScale
from oprd_megatron.representation.space import check_space, frozen_space
from oprd_megatron.representation.taps import tapped_modules, with_state

Read = Callable[[Any], TokenBatch]


class Attachment:
    """A student with a teacher; made by `attach`.

    Attributes:
        report: of the last step, the same on every rank; None before the first.
        progress: 0 to 1, moves scheduled coefficients and layer weights; the loop may set it.
        trains_alone: the loop has no loss of its own (`representation_step` sets it): what `loss_func` counts is then the
            supervised tokens, whatever a batch says.
        pairs: supervised layers.
        grid: the student's.
    """

    def __init__(
        self, model: torch.nn.Module | Sequence[torch.nn.Module], teacher: Teacher, distill: DistillConfig
    ) -> None:
        self.chunks, self.teacher, self.distill = unwrapped(model), teacher, distill
        self.config = get_model_config(self.chunks[0])
        if distill.space in ("linear", "none") or distill.cross_tokenizer:
            what = "cross_tokenizer" if distill.cross_tokenizer else f"mode: {distill.space}"
            raise ConfigError(f"attach: distill.{what} is the trainer's alone; use identity or a bridge (low_rank)")
        check_space(distill, teacher.width, self.config.hidden_size)
        self.pairs = resolve_layer_pairs(distill, self.config.num_layers, teacher.num_layers)
        self.grid = grid_of(self.chunks)
        self.platform = select_platform("cuda" if next(self.chunks[0].parameters()).is_cuda else "cpu")
        self.space = frozen_space(distill, self.pairs, teacher.width, self.config.hidden_size, self.platform.device)
        teacher.check(distill, self.pairs)
        self.report: AlignmentReport | None = None
        self.progress, self.trains_alone = 0.0, False
        self._aligner: Aligner | None = None
        self._calls: Counter[tuple[int, bool]] = Counter()
        self._losses = 0
        normed = self.config.num_layers if distill.final_state == "post_norm" else None
        places = tapped_modules(self.chunks, (pair.student_layer for pair in self.pairs), normed)
        self._handles = [module.register_forward_hook(self._hook(layer)) for layer, module in places]
        self._layers = [layer for layer, _ in places]

    @contextlib.contextmanager
    def step(self, batches: Sequence[TokenBatch], divides: bool = True) -> Iterator[Step]:
        """Within the block, the student's schedule runs once over these micro-batches, forward and backward, or forward alone
        to measure. `report` is there afterwards. Collective over the world.

        Args:
            batches: micro-batches of this data-parallel rank, in order; the same on all ranks of a model replica.
            divides: `loss_func` returns a number of tokens, so that with calculate_per_token_loss mcore divides by it.

        Raises:
            DataError: the batches cannot be placed, or the schedule did not run over them.
        """
        everybody: list[Sequence[TokenBatch]] = [[]] * self.grid.layout.dp
        dist.all_gather_object(everybody, [self._as_told(batch) for batch in batches], group=self.grid.groups.dp)
        step = Step.of(everybody, self.grid.layout, self.distill)
        wanted = Wanted(step, self.pairs, self.grid, self.distill, self.space, self.platform)
        delivered, order = self.teacher.deliver(wanted, batches)
        weights = layer_weights(self.distill, self.pairs, self.progress)
        coefficient = weight_at(self.distill.coefficient, self.progress)
        scale = LossScale(coefficient * self._factor(step, divides), max(1, step.num_tokens), weights)
        self._aligner = Aligner(
            self.pairs, delivered, step.tokens, order, self.grid,
            scale=scale, how=self.distill.normalization, device=self.platform.device, space=self.space,
        )  # fmt: skip
        self._calls.clear()
        self._losses = 0
        try:
            yield step
            self._check_calls(step)
            sums, device = self._aligner.sums(), self.platform.device
            self.report = reduce_sums(sums, self.pairs, coefficient, weights, self.space.is_watched, device)
        finally:
            self._aligner = None

    def around(
        self, forward_backward: Callable[..., Any], read: Read = megatron_batch, divides: bool = True
    ) -> Callable[..., Any]:
        """One of mcore's schedules with the teacher in front of it; same arguments, same result. Its forward_only calls pass
        through, without a teacher.

        The step's micro-batches are taken from the data iterator of each replica's first rank (tp 0, pp 0, cp 0), told to the
        others, and given to the schedule as they came. So iterators may be None elsewhere, as in Megatron-LM.

        Args:
            forward_backward: of `get_forward_backward_func()`.
            read: makes a `TokenBatch` of what the iterator gives.
            divides: as for `step`.
        """

        def run(*, data_iterator: Any, num_microbatches: int, forward_only: bool = False, **arguments: Any) -> Any:
            if forward_only:
                return forward_backward(
                    data_iterator=data_iterator, num_microbatches=num_microbatches, forward_only=True, **arguments
                )
            data_iterator, batches = self._look_ahead(data_iterator, num_microbatches, read)
            with self.step(batches, divides) as step, self._checked_tokens(step, divides):
                results = forward_backward(
                    data_iterator=data_iterator, num_microbatches=num_microbatches, forward_only=False, **arguments
                )
            for result in results:
                if isinstance(result, dict):
                    result["oprd loss"] = torch.tensor([self.report.loss], device=self.platform.device)  # type: ignore[union-attr]
            return results

        return run

    def detach(self) -> None:
        """Take the hooks off the student."""
        for handle in self._handles:
            handle.remove()

    def next_supervised_tokens(self) -> int:
        """For a loss function: supervised tokens of the micro-batch whose loss it is, on this rank's data- and context-parallel
        share. Losses are asked for in the order of the micro-batches. Within a `step`."""
        assert self._aligner is not None, "outside of a step"
        rows = self._aligner.rows.get(self._losses)
        self._losses += 1
        return 0 if rows is None else len(rows.tokens)

    def _as_told(self, batch: TokenBatch) -> TokenBatch:
        """What other data-parallel ranks are told of a micro-batch."""
        return replace(batch, states=None, loss_tokens=None if self.trains_alone else batch.loss_tokens)

    def _hook(self, layer: int) -> Callable[..., Any]:
        def seen(hidden: torch.Tensor) -> torch.Tensor | None:
            if self._aligner is None:
                return None
            call = layer, torch.is_grad_enabled()
            number, self._calls[call] = self._calls[call], self._calls[call] + 1
            return self._aligner.on_state(layer, number, hidden)

        return lambda module, inputs, output: with_state(output, seen)

    def _factor(self, step: Step, divides: bool) -> float:
        """What the injected gradients are multiplied by, besides 1 / M: see the table at the top."""
        grad_scale = self.config.grad_scale_func
        scale = 1.0 if grad_scale is None else float(grad_scale(torch.ones(1, device=self.platform.device)))
        if not self.config.calculate_per_token_loss:
            return scale * self.grid.layout.dp * self.grid.layout.cp
        return scale * (step.loss_tokens if divides else 1)

    def _look_ahead(self, data_iterator: Any, count: int, read: Read) -> tuple[Any, list[TokenBatch]]:
        batches: list[TokenBatch] = []
        if is_first(self.grid):
            iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
            items = [next(iterators[0]) for _ in range(count)]
            batches = [read(item) for item in items]
            data_iterator = [iter(items), *iterators[1:]] if isinstance(data_iterator, list) else iter(items)
        return data_iterator, told_by_first(self.grid, batches)

    @contextlib.contextmanager
    def _checked_tokens(self, step: Step, divides: bool) -> Iterator[None]:
        """Compare what mcore divides by with what was expected: a wrong factor would not show."""
        finalize = self.config.finalize_model_grads_func
        if finalize is None or not self.config.calculate_per_token_loss:
            yield
            return

        def checked(model: Any, num_tokens: torch.Tensor | None = None, *arguments: Any, **keywords: Any) -> None:
            finalize(model, num_tokens, *arguments, **keywords)  # adds num_tokens up over all ranks, in place
            expected = step.loss_tokens if divides else 0
            if num_tokens is not None and int(num_tokens) != expected:
                raise DataError(
                    f"oprd: loss_func returned {int(num_tokens)} tokens in this step, but the batches say {expected}; set "
                    "TokenBatch.loss_tokens to what it counts, or divides=False if it returns (loss, metrics)"
                )

        self.config.finalize_model_grads_func = checked
        try:
            yield
        finally:
            self.config.finalize_model_grads_func = finalize

    def _check_calls(self, step: Step) -> None:
        for layer in self._layers:
            ran = max(self._calls[layer, True], self._calls[layer, False])
            if ran != step.num_micro_batches:
                raise DataError(
                    f"oprd: the schedule took layer {layer} through {ran} micro-batches, but the step was of "
                    f"{step.num_micro_batches}; give `step` what the schedule reads"
                )


def attach(
    model: torch.nn.Module | Sequence[torch.nn.Module], teacher: Teacher, distill: DistillConfig | None = None
) -> Attachment:
    """Teach an mcore GPTModel by a teacher's hidden states. Collective over the world; once, before or after the model is
    wrapped in DDP.

    Args:
        model: the student: a GPTModel or the list of its chunks, on the ranks of the world in any tp, sp, cp, pp, vpp and dp.
        teacher: where states come from.
        distill: what is compared; left out, all layers, the last 2000 response tokens of each sequence.

    Raises:
        UserError: one line.
    """
    return Attachment(model, teacher, distill or DistillConfig())
