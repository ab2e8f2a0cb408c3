"""The ways to do an update that are compared: one method of `Bench` for each family of arms.

`oprd` and `opd` call the library as the trainer does. `dense` and `release` are written here, on purpose in the usual way:
whole logits or whole stacks of states, and autograd for the rest. All leave their gradients in the student's buffers.

Legend: P tokens of a micro-batch (one rollout), N tokens of its response, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oprd_megatron.config.output import OutputConfig
from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.models import Model, run_schedule
from oprd_megatron.objectives.output_loss import OutputLoss
from oprd_megatron.optimizer import StudentOptimizer
from oprd_megatron.platform import Platform
from oprd_megatron.representation.alignment import Alignment
from oprd_megatron.representation.batch import Sample
from oprd_megatron.representation.feed import micro_batches
from oprd_megatron.representation.flow import Passes, Phase
from oprd_megatron.representation.placement import arrange
from oprd_megatron.representation.taps import OnState, attached_taps

from .case import TOP_K, Case

Keep = Callable[[Tensor], Tensor]
"""The teacher's logits [1, P, V] -> what is kept for the loss."""
LossOf = Callable[[Sample, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(sample, the student's logits [1, P, V], what was kept) -> (the loss, a scalar that has its gradient)."""


@dataclass(frozen=True)
class Bench:
    """Both models on one rank, the student's optimizer, and the case they are of."""

    case: Case
    teacher: Model
    student: Model
    optimizer: StudentOptimizer
    platform: Platform

    def run(self, arm: str, samples: list[Sample], phase: Phase) -> float:
        """Do one step of an arm, into the student's gradient buffers. Returns the loss."""
        how, _, term = arm.partition("-")
        if term:
            return (self._opd if how == "opd" else self._dense)(samples, phase, term)
        return (self._oprd if how == "oprd" else self._release)(samples, phase)

    def _oprd(self, samples: list[Sample], phase: Phase) -> float:
        """Eq. 6 as the trainer does it."""
        alignment = Alignment(self.teacher, self.student, self._last_k(), self.platform, micro_batch_size=1)
        passes = Passes(train=True, chunks=self.optimizer.chunks, phase=phase)
        return alignment.reduce(alignment.run(alignment.plan(samples), passes)).loss

    def _opd(self, samples: list[Sample], phase: Phase, term: str) -> float:
        """An output-space term as the trainer does it (trainer.py, `forward_backward`)."""
        config = OutputConfig.model_validate({"terms": [{"kind": term, **({"k": TOP_K} if term == "topk" else {})}]})
        output = OutputLoss(self.teacher, self.student, config, self.platform.device)
        no_states = DistillConfig(mode="none")
        alignment = Alignment(self.teacher, self.student, no_states, self.platform, 1, signal=output.signal)
        plan = alignment.plan(samples)
        batch = output.of_batch(plan, output.weights(0.0))
        alignment.run(plan, Passes(train=True, chunks=self.optimizer.chunks, on_outputs=batch.on_outputs, phase=phase))
        return sum(batch.means().values())

    def _dense(self, samples: list[Sample], phase: Phase, term: str) -> float:
        """The same term from whole logits of both models, a micro-batch at a time."""
        weight = 1 / sum(len(sample.response_ids) for sample in samples)
        dense = {"topk": dense_topk, "sampled": dense_sampled, "full": dense_full}[term]

        def loss_of(sample: Sample, logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
            first = len(sample.prompt_ids) - 1
            rows = slice(first, first + len(sample.response_ids))  # the states that predict the response
            student, teacher = (x[0, rows, : self.case.vocab] for x in (logits, teacher_logits))
            value, surrogate = dense(student, teacher, torch.tensor(sample.response_ids, device=logits.device))
            return weight * value, weight * surrogate

        return self._by_micro_batch(samples, phase, lambda logits: logits, loss_of)

    def _release(self, samples: list[Sample], phase: Phase) -> float:
        """Full-length fp32 stacks of every layer of both models, then the selection. The logits are computed for nothing."""
        config, tapped = self._last_k(), {}
        weight = 1 / sum(len(sample.positions(config)[1]) for sample in samples)

        def tap(layer: int, micro_batch: int, hidden: Tensor) -> None:
            tapped[layer] = hidden

        def stack(_: Tensor) -> Tensor:
            """[layers, P, D] fp32, connected to the states if gradients are on."""
            states = torch.stack([tapped[layer].flatten(0, 1).float() for layer in sorted(tapped)])
            tapped.clear()
            return states

        def loss_of(sample: Sample, logits: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
            rows = sample.positions(config)[1]
            student, teacher = (states[:, rows[0] : rows[-1] + 1] for states in (stack(logits), teacher))
            loss = weight * (student - teacher).square().mean(-1).mean(0).sum()
            return loss.detach(), loss

        return self._by_micro_batch(samples, phase, stack, loss_of, tap)

    def _by_micro_batch(
        self, samples: list[Sample], phase: Phase, keep: Keep, loss_of: LossOf, tap: OnState | None = None
    ) -> float:
        """Run teacher, then student, with their heads, on one micro-batch after the other, so that no more than one
        micro-batch of the teacher's is held. Returns the sum of the losses."""
        kept: dict[int, Tensor] = {}
        losses = []

        def on_teacher(micro_batch: int, logits: Tensor) -> Tensor:
            kept[micro_batch] = keep(logits)
            return logits.new_zeros(())

        def on_student(micro_batch: int, logits: Tensor) -> Tensor:
            value, surrogate = loss_of(samples[micro_batch], logits, kept.pop(micro_batch))
            losses.append(value)
            return surrogate

        layers = range(1, self.case.layers + 1) if tap else ()
        tap = tap or (lambda layer, micro_batch, hidden: None)
        ids = [sample.ids for sample in samples]
        arrangement = arrange([len(of) for of in ids], self.student.grid.layout, 1)
        for batch in micro_batches(ids, arrangement, self.student.grid):
            with phase("teacher"), attached_taps(self.teacher, layers, "post_norm", tap):
                run_schedule(self.teacher, self.platform, [batch], forward_only=True, head=True, on_output=on_teacher)
            with phase("student"), attached_taps(self.student, layers, "post_norm", tap):
                run_schedule(
                    self.student, self.platform, [batch], forward_only=False, chunks=self.optimizer.chunks, head=True,
                    on_output=on_student, finalize=batch.number + 1 == len(samples),
                )  # fmt: skip
        return sum(map(float, losses))

    def _last_k(self) -> DistillConfig:
        return DistillConfig(positions="last_k", k=self.case.k)

    def resident_bytes(self) -> int:
        """Bytes of weights, gradient buffers and optimizer state, each storage counted once."""
        chunks = [*self.teacher.chunks, *self.student.chunks]
        tensors: list[Any] = [parameter for chunk in chunks for parameter in chunk.parameters()]
        tensors += [getattr(tensor, "main_grad", None) for tensor in tensors]
        for optimizer in getattr(self.optimizer.optimizer, "chained_optimizers", [self.optimizer.optimizer]):
            tensors += [value for state in optimizer.optimizer.state.values() for value in state.values()]
            tensors += [parameter for group in optimizer.optimizer.param_groups for parameter in group["params"]]
        storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


# A dense loss takes (the student's logits [N, V], the teacher's, y_t [N]) and gives (its sum over tokens, a scalar that has its
# gradient).


def dense_topk(student: Tensor, teacher: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 5: reverse KL, renormalised on the student's top 16."""
    log_p, log_q = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    top = log_p.topk(TOP_K).indices
    log_p, log_q = (log.gather(-1, top).log_softmax(-1) for log in (log_p, log_q))
    loss = (log_p.exp() * (log_p - log_q)).sum()
    return loss.detach(), loss


def dense_sampled(student: Tensor, teacher: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The one-sample estimate of reverse KL as a policy gradient: its value is log p - log q at y_t, its gradient that value,
    held constant, times the gradient of log p."""
    log_p, log_q = (x.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1) for x in (student, teacher))
    advantage = (log_p - log_q).detach()
    return advantage.sum(), (advantage * log_p).sum()


def dense_full(student: Tensor, teacher: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 4: reverse KL over the vocabulary."""
    log_p, log_q = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    loss = (log_p.exp() * (log_p - log_q)).sum()
    return loss.detach(), loss
