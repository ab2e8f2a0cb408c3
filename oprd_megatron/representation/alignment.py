"""One batch through the method: teacher states, exchange, the student's loss. The trainer and the evaluation both use it.

    plan   = alignment.plan(samples)
    report = alignment.reduce(alignment.run(plan, train=True))

How a batch goes through is `flow.py`'s business, in which space states are compared `space.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from oprd_megatron.config.schedule import weight_at
from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.models import Model
from oprd_megatron.platform import Platform
from oprd_megatron.representation.batch import BatchPlan, Chunk, Sample
from oprd_megatron.representation.exchange import Delivery
from oprd_megatron.representation.flow import Forward, OutputSignal, Passes, StateFlow
from oprd_megatron.representation.injection import Aligner
from oprd_megatron.representation.layer_map import LayerPair, resolve_layer_pairs
from oprd_megatron.representation.layer_weights import layer_weights
from oprd_megatron.representation.loss import ALIGNMENT_FIELDS, LossScale
from oprd_megatron.representation.space import Identity, Space, build_space
from oprd_megatron.representation.wire import Wire, wire_name

OnCosines = Callable[[np.ndarray, torch.Tensor], None]


@dataclass(frozen=True)
class AlignmentReport:
    """Averages over the supervised tokens of a global batch, the same on every rank. Lists follow `student_layers`.

    Attributes:
        loss: Eq. 6 or 14 with its coefficient and layer weights.
        student_layers, teacher_layers: the supervised pairs (1-based).
        layer_loss: each layer's own mean loss term, without coefficient and weight.
        mse: raw mean squared difference per width.
        cosine: cosine of student and teacher state, in the space they are compared in.
        norm_ratio: |h_S| / |h_T|.
        inside: share of the student state's square length that its frozen projection sees; None without a linear one.
        wire_error: mean relative rounding error of the teacher's states on an fp8 wire, None on others.
    """

    loss: float
    student_layers: list[int]
    teacher_layers: list[int]
    layer_loss: list[float]
    mse: list[float]
    cosine: list[float]
    norm_ratio: list[float]
    inside: list[float] | None
    wire_error: float | None

    @property
    def mean_cosine(self) -> float | None:
        """Over layers; None where no states are compared."""
        return sum(self.cosine) / len(self.cosine) if self.cosine else None

    def by_layer(self) -> dict[str, list[int] | list[float]]:
        """The `layers` of a run's records."""
        return {
            "student": self.student_layers,
            "teacher": self.teacher_layers,
            "loss": self.layer_loss,
            "cosine": self.cosine,
            "mse": self.mse,
            "norm_ratio": self.norm_ratio,
            **({} if self.inside is None else {"inside": self.inside}),
        }


class Alignment:
    """The representation loss between a frozen teacher and a student, whatever their layouts.

    Args:
        teacher, student: the models.
        config: what is aligned.
        platform: of this run.
        micro_batch_size: rollouts in one forward pass.
        micro_batch_tokens: dynamic batching instead.
        space: in which states are compared; left out, it is built as the config says.
        signal: what is looked at of the outputs; None if nothing is.

    Attributes:
        coefficient, layer_weights: factor on the loss, and {student layer: weight in it}; `advance` moves them.
    """

    def __init__(
        self,
        teacher: Model,
        student: Model,
        config: DistillConfig,
        platform: Platform,
        micro_batch_size: int,
        micro_batch_tokens: int | None = None,
        space: Space | None = None,
        signal: OutputSignal | None = None,
    ) -> None:
        self.teacher, self.student, self.config, self.platform = teacher, student, config, platform
        self.pairs = resolve_layer_pairs(config, student.architecture.num_layers, teacher.architecture.num_layers)
        self.advance(0.0)
        self.space = space or build_space(config, self.pairs, teacher, student, platform.device)
        dtype: Literal["fp32", "bf16"] = "bf16" if teacher.config.bf16 else "fp32"
        wire = Wire(wire_name(config, dtype), self.space.width)
        project = None if type(self.space) is Identity else self.space.of_teacher
        self.flow = StateFlow(
            teacher, student, self.pairs, config, platform, wire, project, micro_batch_size, micro_batch_tokens,
            signal=signal,
        )  # fmt: skip

    @property
    def wire(self) -> Wire:
        """Format of what travels."""
        return self.flow.wire

    @property
    def sent_bytes(self) -> int:
        """Bytes of states that this rank sent in the last `run`."""
        return self.flow.sent_bytes

    @property
    def peak_bytes(self) -> int:
        """Most bytes of states that this rank held at a time in the last `run`."""
        return self.flow.peak_bytes

    def advance(self, progress: float) -> None:
        """Move the weights to where they are at `progress`: 0 at the first step, 1 at the last."""
        self.coefficient = weight_at(self.config.coefficient, progress)
        self.layer_weights = layer_weights(self.config, self.pairs, progress)

    def plan(self, samples: Sequence[Sample]) -> BatchPlan:
        """Chunks of a global batch, arranged and routed."""
        return self.flow.plan(samples)

    def planned_bytes(self, plan: BatchPlan) -> int:
        """Bytes that the exchange moves between ranks, over the whole world."""
        return self.flow.planned_bytes(plan)

    def run(
        self,
        plan: BatchPlan,
        passes: Passes | None = None,
        *,
        train: bool = False,
        chunks: Sequence[torch.nn.Module] | None = None,
        cosines_of: Callable[[Chunk], OnCosines] | None = None,
        weight: float = 1.0,
    ) -> dict[int, torch.Tensor]:
        """Take a batch through teacher, exchange and student. No LM head is called on either model. Collective.

        Args:
            plan: from `plan`.
            passes: how; left out, Passes(train, chunks).
            train, chunks: as in `Passes`.
            weight: factor on the gradients, besides the coefficient; what is measured is without it.
            cosines_of: makes, for each chunk, what is called with every layer's (token numbers [N], cosines [N]) on this rank.

        Returns:
            This rank's {student layer: sums of `ALIGNMENT_FIELDS`}; `reduce` makes a report of them.
        """
        scale = LossScale(self.coefficient * weight, plan.num_tokens, self.layer_weights)
        totals: dict[int, torch.Tensor] = {}

        def learn(chunk: Chunk, delivery: Delivery, forward: Forward) -> None:
            aligner = Aligner(
                self.pairs, delivery, chunk.student.tokens, chunk.route.order, self.student.grid,
                scale=scale, how=self.config.normalization, device=self.platform.device, space=self.space,
                on_cosines=cosines_of(chunk) if cosines_of else None,
            )  # fmt: skip
            forward(aligner.teacher_layer, aligner.on_state)
            for layer, value in aligner.sums().items():
                totals[layer] = totals.get(layer, torch.zeros_like(value)) + value

        self.flow.run(plan, learn, passes or Passes(train=train, chunks=chunks))
        return totals

    def reduce(self, sums: dict[int, torch.Tensor], lost: np.ndarray | None = None) -> AlignmentReport:
        """Add the ranks' sums and average. Collective: all-reduces of a few numbers a layer.

        Args:
            sums: this rank's, of one `run` or added up over several.
            lost: what this rank's wire lost in them (`StateFlow.rounding`); left out, of the last `run`.
        """
        rounding = torch.from_numpy(np.copy(self.flow.rounding if lost is None else lost))
        dist.all_reduce(rounding)
        wire_error = float(rounding[0] / rounding[1]) if self.wire.is_lossy else None
        return reduce_sums(
            sums, self.pairs, self.coefficient, self.layer_weights, self.space.is_watched, wire_error=wire_error
        )


def reduce_sums(
    sums: Mapping[int, torch.Tensor],
    pairs: Sequence[LayerPair],
    coefficient: float,
    weights: Mapping[int, float],
    is_watched: bool,
    device: torch.device | None = None,
    wire_error: float | None = None,
) -> AlignmentReport:
    """Add the ranks' {student layer: sums of `ALIGNMENT_FIELDS`} and average. Collective over the world: one all-reduce.

    Args:
        sums: this rank's.
        pairs: the supervised layers.
        coefficient, weights: of the loss.
        is_watched: the space's.
        device: what the all-reduce goes through, where the process group has no gloo; left out, the CPU.
        wire_error: passed on.
    """
    zero = torch.zeros(len(ALIGNMENT_FIELDS), dtype=torch.float64)
    table = zero.new_zeros(0, len(zero))
    if pairs:
        table = torch.stack([sums.get(pair.student_layer, zero) for pair in pairs]).to(device)
        dist.all_reduce(table)
    rows = table[:, ALIGNMENT_FIELDS.index("rows")]
    means = dict(zip(ALIGNMENT_FIELDS, (table / rows.clamp_min(1).unsqueeze(1)).T.tolist(), strict=True))
    weighted = sum(weights[pair.student_layer] * loss for pair, loss in zip(pairs, means["loss"], strict=True))
    return AlignmentReport(
        loss=coefficient * weighted / max(1, len(pairs)),
        student_layers=[pair.student_layer for pair in pairs],
        teacher_layers=[pair.teacher_layer for pair in pairs],
        layer_loss=means["loss"],
        mse=means["mse"],
        cosine=means["cosine"],
        norm_ratio=means["norm_ratio"],
        inside=means["inside"] if is_watched else None,
        wire_error=wire_error,
    )
