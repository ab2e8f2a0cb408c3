"""From tokens to log-probabilities, in two halves: the last stage keeps the final hidden states that predict response
tokens (D numbers a token), then a head turns them into logits in chunks of tokens, so that [tokens, V] never exists.

Legend: N response tokens of this data- and context-parallel rank; D width; V_local head rows on this rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from checkpoints_conversion import mappings_for
from checkpoints_conversion.reader import read_rows
from checkpoints_conversion.weights import open_weights
from oprd_megatron.models import Model, no_output_loss
from oprd_megatron.objectives.vocab_parallel import vocab_parallel_log_softmax
from oprd_megatron.representation.batch import Sample
from oprd_megatron.representation.placement import Arrangement, place_tokens
from oprd_megatron.representation.positions import predicting_positions
from oprd_megatron.representation.rows import block_rows, gather_rows

CHUNK_TOKENS = 256
"""Tokens whose logits exist at once."""


class FinalStates:
    """A model's final hidden states at the positions that predict response tokens, on its own last stage.

    `on_output` is given to the schedule: without the head the last stage's output is the state after the final norm.

    Args:
        model: teacher or student; this rank is on its grid.
        samples: rollouts of the pass.
        arrangement: of the samples on the model's grid.
    """

    def __init__(self, model: Model, samples: Sequence[Sample], arrangement: Arrangement) -> None:
        self.model = model
        self.ids = np.array([token for sample in samples for token in sample.response_ids], dtype=np.int64)
        positions = [predicting_positions(len(s.prompt_ids), range(len(s.response_ids))) for s in samples]
        tokens = place_tokens(positions, arrangement, model.grid.layout)
        self._device = next(model.chunks[-1].parameters()).device
        self.rows = block_rows(tokens, np.arange(len(self.ids)), model.grid, self._device)
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


def head_log_probs(
    states: torch.Tensor, weight: torch.Tensor, vocab_size: int, group: dist.ProcessGroup, temperature: float = 1.0
) -> Iterator[torch.Tensor]:
    """Shards of log-probabilities [n, V_local] fp32, `CHUNK_TOKENS` tokens at a time.

    Args:
        states: [N, D] after the final norm.
        weight: [V_local, D], this rank's rows of the head.
        vocab_size: ids from here on are left out.
        group: tensor-parallel group that the head is sharded over.
        temperature: logits are divided by it.
    """
    for chunk in states.split(CHUNK_TOKENS):
        logits = chunk @ weight.detach().T
        yield vocab_parallel_log_softmax(
            logits if temperature == 1 else logits.float() / temperature, vocab_size, group
        )


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
    with contextlib.closing(open_weights(teacher.source, teacher.architecture)) as source:
        rows = torch.empty(mapping.megatron_shape(student.sharding), dtype=teacher.config.params_dtype)
        mapping.load(rows, partial(read_rows, source), student.sharding)
    return rows.to(student.head_weight.device)
