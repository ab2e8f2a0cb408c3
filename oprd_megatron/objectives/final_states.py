"""From tokens to log-probabilities, in two halves: the last stage keeps the final hidden states that predict response
tokens (D numbers a token), then a head turns them into logits in chunks of tokens, so that [tokens, V] never exists.

The teacher's final states travel to the ranks of the student's last stage (`TeacherFinals`), by the same kind of plan as
all states, and meet the teacher's head there, sharded like the student's: D numbers a token are sent, not V.

Legend: N response tokens of this data- and context-parallel rank; D width; V_local head rows on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist

from checkpoints_conversion import HFReader, mappings_for
from oprd_megatron.models import Model, no_output_loss
from oprd_megatron.objectives.vocab_parallel import vocab_parallel_log_softmax
from oprd_megatron.representation.batch import Chunk, Sample
from oprd_megatron.representation.exchange import Delivery
from oprd_megatron.representation.layer_map import LayerPair
from oprd_megatron.representation.placement import Arrangement, place_tokens
from oprd_megatron.representation.route import plan_route
from oprd_megatron.representation.rows import block_rows, gather_rows
from oprd_megatron.representation.wire import Wire

CHUNK_TOKENS = 256
"""Tokens whose logits exist at once."""


class FinalStates:
    """A model's final hidden states at the positions that predict response tokens, on its own last stage.

    `on_output` is given to the schedule: without the head the last stage's output is the state after the final norm.

    Args:
        model: teacher or student; this rank is on its grid.
        samples: rollouts of the pass.
        arrangement: of the samples on the model's grid.
        order: of the response tokens (`Route.order`); left out, as they come.
    """

    def __init__(
        self, model: Model, samples: Sequence[Sample], arrangement: Arrangement, order: np.ndarray | None = None
    ) -> None:
        self.model = model
        self.ids = np.array([token for sample in samples for token in sample.response_ids], dtype=np.int64)
        tokens = place_tokens([predicting_positions(sample) for sample in samples], arrangement, model.grid.layout)
        self._device = next(model.chunks[-1].parameters()).device
        self.rows = block_rows(tokens, np.arange(len(self.ids)) if order is None else order, model.grid, self._device)
        self._states: dict[int, torch.Tensor] = {}

    def on_output(self, micro_batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """Keep this micro-batch's rows of hidden [P_local, 1, D]. Collective over the tensor-parallel group under sequence
        parallelism: one all-gather of the rows."""
        if micro_batch in self.rows:
            rows, flat = self.rows[micro_batch], hidden.detach().flatten(0, 1)
            if rows.replicated:
                kept = flat.index_select(0, torch.cat(rows.by_rank))
            else:
                kept = gather_rows(flat.index_select(0, rows.mine), rows.by_rank, self.model.grid.groups.tp)
            self._states[micro_batch] = kept
        return no_output_loss(micro_batch, hidden)

    def states(self) -> torch.Tensor:
        """[N, D], micro-batch by micro-batch."""
        empty = torch.empty(0, self.model.architecture.hidden_size, dtype=self.model.config.params_dtype)
        return torch.cat([empty.to(self._device), *(self._states[number] for number in sorted(self._states))])

    def tokens(self) -> np.ndarray:
        """Numbers of the response tokens that `states` predict, sample by sample over all samples: [N]."""
        return np.concatenate([np.arange(0), *(self.rows[number].tokens for number in sorted(self._states))])

    def target_chunks(self) -> Iterator[torch.Tensor]:
        """The response tokens that `states` predict, cut like `head_log_probs`: [n] int64 each."""
        yield from torch.from_numpy(self.ids[self.tokens()]).to(self._device).split(CHUNK_TOKENS)


class TeacherFinals:
    """The teacher's final states for the ranks of the student's last stage, in the order of `route.order`, which the student's
    `FinalStates` are given too."""

    def __init__(self, teacher: Model, student: Model, chunk: Chunk, device: torch.device) -> None:
        positions = [predicting_positions(sample) for sample in chunk.samples]
        layouts = teacher.grid.layout, student.grid.layout
        teacher_tokens = place_tokens(positions, chunk.teacher.arrangement, layouts[0])
        self.tokens = place_tokens(positions, chunk.student.arrangement, layouts[1])
        self.layer, self.grid, self.device = layouts[0].num_layers, student.grid, device
        pair = LayerPair(layouts[1].num_layers, self.layer)
        self.route = plan_route([pair], layouts[0], teacher_tokens, layouts[1], self.tokens)
        self.wire = Wire("bf16" if teacher.config.bf16 else "fp32", teacher.architecture.hidden_size)
        self.delivery = Delivery(self.route, teacher_tokens, dist.get_rank(), self.wire, device)

    def on_output(self, micro_batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """Keep what the plan wants of hidden [P_local, 1, D]."""
        self.delivery.put(self.layer, micro_batch, hidden)
        return no_output_loss(micro_batch, hidden)

    def states(self) -> torch.Tensor | None:
        """[N, D] on the student's last stage, None elsewhere. Collective: the exchange, then one all-gather over the
        student's tensor-parallel group for each micro-batch."""
        self.delivery.post()
        self.delivery.wait()
        if not self.grid.is_last_stage:
            return None
        whole = [torch.empty(0, self.wire.width, dtype=self.wire.dtype, device=self.device)]
        for micro_batch, rows in block_rows(self.tokens, self.route.order, self.grid, self.device).items():
            mine = self.delivery.rows(micro_batch, self.layer)
            whole.append(gather_rows(whole[0] if mine is None else mine, rows.by_rank, self.grid.groups.tp))
        return torch.cat(whole)


def predicting_positions(sample: Sample) -> range:
    """Sequence indices of the states that predict the response tokens: one before each."""
    first = len(sample.prompt_ids) - 1
    return range(first, first + len(sample.response_ids))


def head_log_probs(
    states: torch.Tensor, weight: torch.Tensor, vocab_size: int, group: dist.ProcessGroup
) -> Iterator[torch.Tensor]:
    """Shards of log-probabilities [n, V_local] fp32, `CHUNK_TOKENS` tokens at a time.

    Args:
        states: [N, D] after the final norm.
        weight: [V_local, D], this rank's rows of the head.
        vocab_size: ids from here on are left out.
        group: tensor-parallel group that the head is sharded over.
    """
    for chunk in states.split(CHUNK_TOKENS):
        yield vocab_parallel_log_softmax(chunk @ weight.detach().T, vocab_size, group)


def teacher_head(teacher: Model, student: Model) -> torch.Tensor | None:
    """The teacher's head, sharded like the student's, on the student's last stage; None elsewhere.

    Where both models lie alike it is the teacher's own; else this rank reads its rows from the teacher's directory.
    """
    if not student.grid.is_last_stage:
        return None
    shards = [
        (model.sharding.tp_rank, model.sharding.tp_size, model.sharding.vocab_size_padded)
        for model in (teacher, student)
    ]
    if teacher.grid.is_last_stage and shards[0] == shards[1]:
        return teacher.head_weight
    mapping = mappings_for(teacher.architecture)["output_layer.weight"]
    with HFReader(teacher.source) as reader:
        rows = torch.empty(mapping.megatron_shape(student.sharding), dtype=teacher.config.params_dtype)
        mapping.load(rows, reader.read, student.sharding)
    return rows.to(student.head_weight.device)
