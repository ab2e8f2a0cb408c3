"""From tokens to log-probabilities, in two halves: the last stage keeps the final hidden states that predict response
tokens (D numbers a token), then a head turns them into logits in chunks of tokens, so that [tokens, V] never exists.

The teacher's final states travel to the ranks of the student's last stage (`TeacherFinals`), by the same kind of plan as
all states, and meet the teacher's head there, sharded like the student's: D numbers a token are sent, not V.

Legend: N response tokens of this data-parallel rank; D width; V_local head rows on this rank. Tokens of a micro-batch are in
the order of their rows (position first, then column).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from checkpoints_conversion import HFReader, mappings_for
from oprd_megatron.models import Model, no_output_loss
from oprd_megatron.objectives.vocab_parallel import vocab_parallel_log_softmax
from oprd_megatron.representation.batch import BatchPlan, Sample
from oprd_megatron.representation.exchange import Outbox, exchange
from oprd_megatron.representation.layer_map import LayerPair
from oprd_megatron.representation.placement import Arrangement, place_tokens
from oprd_megatron.representation.route import plan_route
from oprd_megatron.representation.rows import block_rows, gather_rows

CHUNK_TOKENS = 256
"""Tokens whose logits exist at once."""


class FinalStates:
    """A model's final hidden states at the positions that predict response tokens, on its own last stage.

    `on_output` is given to the schedule: without the head the last stage's output is the state after the final norm.
    """

    def __init__(self, model: Model, samples: Sequence[Sample], arrangement: Arrangement) -> None:
        self.model = model
        self.rows: list[torch.Tensor] = []
        self.targets: list[torch.Tensor] = []
        for block in arrangement.samples[model.grid.coords.dp]:
            tokens = sorted(
                (position * len(block) + column, token)
                for column, index in enumerate(block)
                for position, token in zip(
                    predicting_positions(samples[index]), samples[index].response_ids, strict=True
                )
            )
            self.rows.append(torch.tensor([row for row, _ in tokens], dtype=torch.int64))
            self.targets.append(torch.tensor([token for _, token in tokens], dtype=torch.int64))
        self._states: dict[int, torch.Tensor] = {}

    def on_output(self, micro_batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """Keep this micro-batch's rows of hidden [S_local, B, D]."""
        whole = hidden.detach()
        if self.model.config.sequence_parallel:
            whole = gather_from_sequence_parallel_region(whole, group=self.model.grid.groups.tp)
        self._states[micro_batch] = whole.flatten(0, 1).index_select(0, self.rows[micro_batch].to(hidden.device))
        return no_output_loss(micro_batch, hidden)

    def states(self) -> torch.Tensor:
        """[N, D], micro-batch by micro-batch."""
        return torch.cat([self._states[number] for number in sorted(self._states)])

    def target_chunks(self) -> Iterator[torch.Tensor]:
        """The response tokens that `states` predict, cut like `head_log_probs`: [n] int64 each."""
        yield from torch.cat(self.targets).to(self._states[0].device).split(CHUNK_TOKENS)


class TeacherFinals:
    """The teacher's final states for the ranks of the student's last stage, in the order of the student's `FinalStates`."""

    def __init__(self, teacher: Model, student: Model, plan: BatchPlan, device: torch.device) -> None:
        positions = [predicting_positions(sample) for sample in plan.samples]
        layouts = teacher.grid.layout, student.grid.layout
        teacher_tokens = place_tokens(positions, plan.teacher.arrangement, layouts[0])
        self.tokens = place_tokens(positions, plan.student.arrangement, layouts[1])
        self.layer, self.grid, self.device = layouts[0].num_layers, student.grid, device
        transfers = plan_route(
            [LayerPair(layouts[1].num_layers, self.layer)], layouts[0], teacher_tokens, layouts[1], self.tokens
        )
        self.outbox = Outbox(
            transfers,
            teacher_tokens,
            dist.get_rank(),
            width=teacher.architecture.hidden_size,
            dtype=teacher.config.params_dtype,
            device=device,
        )

    def on_output(self, micro_batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """Keep what the plan wants of hidden [S_local, B, D]."""
        self.outbox.put(self.layer, micro_batch, hidden)
        return no_output_loss(micro_batch, hidden)

    def states(self) -> torch.Tensor | None:
        """[N, D] on the student's last stage, None elsewhere. Collective: the exchange, then one all-gather over the
        student's tensor-parallel group for each micro-batch."""
        targets, _ = exchange(self.outbox, self.tokens)
        if not self.grid.is_last_stage:
            return None
        whole = []
        for micro_batch, rows in block_rows(self.tokens, self.grid, self.device).items():
            mine = targets.rows(micro_batch, self.layer)
            if mine is None:
                mine = torch.empty(0, self.outbox.width, dtype=self.outbox.dtype, device=self.device)
            whole.append(gather_rows(mine, rows.by_rank, self.grid.groups.tp))
        return torch.cat(whole) if whole else torch.empty(0, self.outbox.width, device=self.device)


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
        rows = mapping.to_megatron(reader.read, student.sharding)
    return rows.to(student.head_weight.device, teacher.config.params_dtype)
