"""Output-space terms in a training step (OPRD Eq. 2-5 and 7), beside the representation loss or instead of it. One forward of
each model serves all of them.

    loss = sum over terms of  weight * sum_t m_t D(p_t, q_t) / sum_t m_t

m_t is the term's own mask over response tokens; its denominator counts the tokens of the GLOBAL batch. p and q are at the
state that predicts y_t (`positions.py`). The teacher's share arrives with the states of a chunk (`signal.py`); the student's
logits exist a few tokens at a time, on its last stage (`fused_terms.py`).

Legend: M supervised tokens of a chunk; P_local tokens of the pack on this rank; N of M on this data- and context-parallel rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from oprd_megatron.config.output import OutputConfig, Term
from oprd_megatron.config.schedule import weight_at
from oprd_megatron.models import Model, no_output_loss
from oprd_megatron.models.schedule import OnOutput
from oprd_megatron.objectives.final_states import teacher_head
from oprd_megatron.objectives.fused_terms import TeacherHead, TeacherSummary, output_terms
from oprd_megatron.objectives.signal import TeacherColumns, TeacherStates
from oprd_megatron.representation.batch import BatchPlan, Chunk, Outputs, Sample
from oprd_megatron.representation.exchange import Delivery
from oprd_megatron.representation.outputs import Supervised, heads_at, supervised_tokens
from oprd_megatron.representation.rows import BlockRows, block_rows, gather_rows, selected_rows


class OutputLoss:
    """The output-space terms of a run.

    Args:
        teacher, student: the models.
        config: at least one term.
        device: of the student's states.

    Attributes:
        signal: what travels of the teacher's outputs, for the run's `StateFlow`.
    """

    def __init__(self, teacher: Model, student: Model, config: OutputConfig, device: torch.device) -> None:
        self.student, self.terms, self.device, self.chunk_tokens = student, config.terms, device, config.chunk_tokens
        self.teacher_layer = teacher.grid.layout.num_layers
        self.vocab_size = min(teacher.architecture.vocab_size, student.architecture.vocab_size)
        predicted, dtype = Supervised(self.terms), "bf16" if teacher.config.bf16 else "fp32"
        layouts = teacher.grid.layout, student.grid.layout
        side = heads_at(config, *layouts, dtype, teacher.architecture.hidden_size)
        self.head: torch.Tensor | None = None
        self.signal: TeacherStates | TeacherColumns
        if side == "student":
            self.head = teacher_head(teacher, student)
            self.signal = TeacherStates(teacher, predicted)
        else:
            self.signal = TeacherColumns(teacher, self.terms, predicted, self.vocab_size, config.chunk_tokens, device)

    def weights(self, progress: float) -> dict[str, float]:
        """{term: weight} at `progress`: 0 at the first step, 1 at the last."""
        return {term.label: weight_at(term.weight, progress) for term in self.terms}

    def counts(self, samples: Sequence[Sample]) -> list[int]:
        """Supervised tokens of each term."""
        lengths = [len(sample.response_ids) for sample in samples]
        return [sum(len(supervised_tokens(term, length)) for length in lengths) for term in self.terms]

    def of_batch(
        self, plan: BatchPlan, weights: Mapping[str, float], counts: Sequence[int] | None = None
    ) -> OutputBatch:
        """The terms of one batch. `counts` are those of the global batch, where `plan` is only a part of it."""
        counts = self.counts(plan.samples) if counts is None else counts
        return OutputBatch(self, counts, [weights[term.label] for term in self.terms])


@dataclass
class OutputBatch:
    """The terms of one batch, and what they came to. Terms whose weight is 0 now are not computed.

    Attributes:
        loss: the run's.
        counts: supervised tokens of the global batch, for each term.
        weights: factor on each term's mean.
    """

    loss: OutputLoss
    counts: Sequence[int]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        summarized = isinstance(self.loss.signal, TeacherColumns) and any(self.weights)  # then all terms are
        self._at_work = [number for number, weight in enumerate(self.weights) if weight or summarized]
        self._sums = torch.zeros(len(self._at_work), dtype=torch.float64)

    def on_outputs(self, number: int, chunk: Chunk, delivery: Delivery | None) -> OnOutput:
        """What is called with the student's final states of a chunk. Collective over its tensor-parallel group."""
        outputs, loss, grid = chunk.outputs, self.loss, self.loss.student.grid
        assert outputs is not None and delivery is not None
        if not self._at_work:
            return no_output_loss
        terms = [loss.terms[number] for number in self._at_work]
        masks = torch.from_numpy(_masks(terms, chunk, outputs)).to(loss.device)
        scale = torch.tensor([self.weights[n] / max(1, self.counts[n]) for n in self._at_work], device=loss.device)
        blocks = block_rows(outputs.student, outputs.order, grid, loss.device)

        def on_output(micro_batch: int, hidden: torch.Tensor) -> torch.Tensor:
            if micro_batch not in blocks:
                return no_output_loss(micro_batch, hidden)
            block, group = blocks[micro_batch], grid.groups.tp
            taught = delivered_rows(delivery, loss.teacher_layer, micro_batch, block, group, loss.device)
            tokens = torch.from_numpy(block.tokens)
            mask = masks[:, tokens.to(loss.device)]
            value, by_term = output_terms(
                selected_rows(hidden, block, group),
                loss.student.head_weight,
                TeacherSummary(taught) if loss.head is None else TeacherHead(taught, loss.head),
                torch.from_numpy(outputs.targets)[tokens].to(loss.device),
                terms,
                mask * scale.unsqueeze(1),
                loss.vocab_size,
                group,
                loss.chunk_tokens,
            )
            if grid.coords.tp == 0:
                self._sums += (by_term * mask).double().sum(1).cpu()
            return value

        return on_output

    def means(self) -> dict[str, float]:
        """{term: mean over its tokens of the global batch}, in nats, of the terms at work (of a part of it: what it adds to the
        mean). Collective."""
        sums = self._sums.to(self.loss.device)
        if self._at_work:
            dist.all_reduce(sums)
        totals = zip(self._at_work, sums.tolist(), strict=True)
        return {self.loss.terms[n].label: total / max(1, self.counts[n]) for n, total in totals}


def delivered_rows(
    delivery: Delivery,
    teacher_layer: int,
    micro_batch: int,
    block: BlockRows,
    group: dist.ProcessGroup,
    device: torch.device,
) -> torch.Tensor:
    """What travelled of the teacher's outputs of a micro-batch, [N, C] on every rank of the student's last stage. Frees it.
    Collective: one all-gather over the tensor-parallel group."""
    mine = delivery.rows(micro_batch, teacher_layer)
    whole = torch.empty(0, delivery.wire.columns, dtype=delivery.wire.dtype) if mine is None else mine
    rows = gather_rows(whole.to(device), block.by_rank, group)
    delivery.release(micro_batch, teacher_layer)
    return rows


def _masks(terms: Sequence[Term], chunk: Chunk, outputs: Outputs) -> np.ndarray:
    """[terms, M] fp32: 1 where a term supervises the token."""
    lengths = np.array([len(sample.response_ids) for sample in chunk.samples], dtype=np.int64)[outputs.sample]
    masks = np.zeros((len(terms), len(outputs.targets)), dtype=np.float32)
    for row, term in enumerate(terms):
        for length in np.unique(lengths):
            kept = supervised_tokens(term, int(length))
            masks[row] += (lengths == length) & (outputs.index >= kept.start) & (outputs.index < kept.stop)
    return masks
