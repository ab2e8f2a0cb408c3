"""From tokens to log-probabilities, in two halves: the last stage keeps the final hidden states that predict response
tokens (D numbers a token), then the head turns them into logits in chunks of tokens, so that [tokens, V] never exists.

Legend: N response tokens of this data-parallel rank; D width; V_local head rows on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from oprd_megatron.models import Model, no_output_loss
from oprd_megatron.objectives.vocab_parallel import vocab_parallel_log_softmax
from oprd_megatron.representation.batch import Sample
from oprd_megatron.representation.placement import Arrangement

CHUNK_TOKENS = 256
"""Tokens whose logits exist at once."""


class FinalStates:
    """Final hidden states at the positions that predict response tokens; `on_output` is given to the schedule.

    Without the head the last stage's output is the state after the final norm. Empty on other stages.
    """

    def __init__(self, model: Model, samples: Sequence[Sample], arrangement: Arrangement) -> None:
        self.model = model
        self.rows: list[torch.Tensor] = []
        self.targets: list[torch.Tensor] = []
        for block in arrangement.samples[model.grid.coords.dp]:
            rows: list[int] = []
            targets: list[int] = []
            for column, index in enumerate(block):
                sample = samples[index]
                first = len(sample.prompt_ids) - 1
                rows += [(first + t) * len(block) + column for t in range(len(sample.response_ids))]
                targets += sample.response_ids
            self.rows.append(torch.tensor(rows, dtype=torch.int64))
            self.targets.append(torch.tensor(targets, dtype=torch.int64))
        self._states: dict[int, torch.Tensor] = {}

    def on_output(self, micro_batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """Keep this micro-batch's rows of hidden [S_local, B, D]."""
        whole = hidden.detach()
        if self.model.config.sequence_parallel:
            whole = gather_from_sequence_parallel_region(whole, group=self.model.grid.groups.tp)
        self._states[micro_batch] = whole.flatten(0, 1).index_select(0, self.rows[micro_batch].to(hidden.device))
        return no_output_loss(micro_batch, hidden)

    def log_probs(self, vocab_size: int) -> Iterator[torch.Tensor]:
        """Shards of log-probabilities [n, V_local] fp32, `CHUNK_TOKENS` at a time, in the order of `target_ids`."""
        chunk = self.model.chunks[-1]
        tied = self.model.architecture.tie_word_embeddings
        weight = chunk.shared_embedding_or_output_weight() if tied else chunk.output_layer.weight
        for states in self._chunks([self._states[number] for number in sorted(self._states)]):
            yield vocab_parallel_log_softmax(states @ weight.detach().T, vocab_size, self.model.grid.groups.tp)

    def target_ids(self) -> Iterator[torch.Tensor]:
        """The response tokens [n] that go with `log_probs`."""
        yield from self._chunks([targets.to(next(iter(self._states.values())).device) for targets in self.targets])

    @staticmethod
    def _chunks(tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        yield from torch.cat(tensors).split(CHUNK_TOKENS)
