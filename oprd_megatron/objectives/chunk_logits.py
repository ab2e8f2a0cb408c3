"""One chunk of tokens of output-space terms: a model's logits and what is read of them, and the gradient by the student's.

The logits of a model are made at most once, and only if some term needs more than a few ids. The gradient is [n, V_local] only
if some term's is; else it stays at a few ids of each token, and goes back through these rows of the head alone.

Legend: n tokens of the chunk; D width of the model; V_local head rows on this rank; k ids of a top set, m ids of a token that
models are compared on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from oprd_megatron.objectives.divergences import Gradient, odds_of_rest
from oprd_megatron.objectives.vocab_parallel import (
    exclude_padding_,
    local_ids,
    vocab_parallel_gather,
    vocab_parallel_log_softmax_,
    vocab_parallel_top_k,
)

HEAD_ROWS = 16384
"""Rows of the head whose gradient of one chunk exists at a time where products are not fp32."""


class ModelChunk:
    """One model on one chunk. Its logits are made if a top set or a log-softmax is needed, kept in fp32 for the temperatures to
    come, and turned into the last one's log-probabilities in place.

    Args:
        states: final ones, [n, D], the same on every rank of `group`.
        head: [V_local, D], dtype of `states`.
        vocab_size: ids from here on are left out.
        group: tensor-parallel group. Collectives: with `top_k` one all-gather of [n, min(top_k, V_local)] int64.
        top_k: 0, or size of the top set.
        temperatures: at which `log_probs` will be called, in this order.
    """

    def __init__(
        self,
        states: torch.Tensor,
        head: torch.Tensor,
        vocab_size: int,
        group: dist.ProcessGroup,
        top_k: int,
        temperatures: Sequence[float],
    ) -> None:
        self.states, self.head, self.vocab_size, self.group = states, head, vocab_size, group
        self.temperatures = temperatures
        self._top_ids = self._logits = None
        if top_k or temperatures:
            logits = exclude_padding_((states @ head.T).float(), vocab_size, group)
            self._top_ids = vocab_parallel_top_k(logits, top_k, vocab_size, group)[0] if top_k else None
            self._logits = logits if temperatures else None

    def top(self, k: int) -> torch.Tensor | None:
        """[n, k] int64, largest logit first; k at most `top_k`. None if no top set was asked for."""
        return None if self._top_ids is None else self._top_ids[:, :k]

    def log_probs(self, temperature: float) -> torch.Tensor:
        """[n, V_local] fp32, the caller's to write on. Collectives: two all-reduces of n numbers."""
        logits = self._logits
        assert logits is not None
        if temperature == self.temperatures[-1]:
            self._logits = None
            logits.div_(temperature)
        else:
            logits = logits / temperature
        return vocab_parallel_log_softmax_(logits, self.vocab_size, self.group)

    def outcome_logits(
        self, ids: torch.Tensor, mask: torch.Tensor, temperature: float, log_probs: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits [n, m] fp32 of the ids of a set at a temperature, whole on every rank.

        Args:
            ids, mask: the set (`compared_set`).
            temperature: of the term.
            log_probs: None: from these rows of the head alone, one all-reduce of [n, m]. Else at the temperature, and the logit
                of what is outside of the set is 0: one all-reduce of [n, m] and one of n numbers.
        """
        if log_probs is not None:
            at_ids = vocab_parallel_gather(log_probs, ids, self.group)
            return odds_of_rest(log_probs, at_ids, ids, mask, self.group)
        local, here = local_ids(ids, len(self.head), self.group)
        logits = (self.head[local] @ self.states.unsqueeze(-1)).squeeze(-1).float().masked_fill_(~here, 0.0)
        dist.all_reduce(logits, group=self.group)
        return logits.div_(temperature)


class LogitGradient:
    """d loss / d logits of a chunk, summed over terms."""

    def __init__(self) -> None:
        self._dense: torch.Tensor | None = None
        self._sparse: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._of_probs: torch.Tensor | None = None

    def add(self, gradient: Gradient, scale: torch.Tensor) -> None:
        """Add `scale` [n] times a term's gradient, whose dense part is overwritten."""
        if gradient.dense is not None:
            dense = gradient.dense.mul_(scale.unsqueeze(-1))
            self._dense = dense if self._dense is None else self._dense.add_(dense)
        if gradient.of_probs is not None:
            of_probs = gradient.of_probs * scale
            self._of_probs = of_probs if self._of_probs is None else self._of_probs.add_(of_probs)
        if gradient.ids is not None and gradient.at_ids is not None:
            self._sparse.append((gradient.ids, gradient.at_ids * scale.unsqueeze(-1)))

    def end_temperature(self, log_p: torch.Tensor, has_probs: bool) -> None:
        """Take up what was a factor on p. Overwrites `log_p`, which holds p already if `has_probs`."""
        if self._of_probs is None:
            return
        probs, factor = log_p if has_probs else log_p.exp_(), self._of_probs.unsqueeze(-1)
        self._dense = probs.mul_(factor) if self._dense is None else self._dense.addcmul_(probs, factor)
        self._of_probs = None

    def finish(self, dtype: torch.dtype, group: dist.ProcessGroup) -> None:
        """Call after the last term: where there is a dense gradient the sparse ones go into it; cast to the products' dtype."""
        if self._dense is not None:
            for ids, values in self._sparse:
                local, here = local_ids(ids, self._dense.size(-1), group)
                self._dense.scatter_add_(-1, local, values.masked_fill(~here, 0.0))
            self._sparse, self._dense = [], self._dense.to(dtype)

    def by_rows(self, head: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor | None:
        """[n, D] fp32, whole on every rank: one all-reduce. None where no term was added."""
        parts = [] if self._dense is None else [(self._dense @ head).float()]
        for ids, values in self._sparse:
            local, here = local_ids(ids, len(head), group)
            mine = values.masked_fill(~here, 0.0).to(head.dtype).unsqueeze(-2)
            parts.append((mine @ head[local]).squeeze(-2).float())
        if not parts:
            return None
        whole = parts[0]
        for part in parts[1:]:
            whole += part
        dist.all_reduce(whole, group=group)
        return whole

    def add_to_head(self, by_head: torch.Tensor, rows: torch.Tensor, group: dist.ProcessGroup) -> None:
        """Add this rank's share to `by_head` [V_local, D] fp32, without another of its size. Collectives: none."""
        if self._dense is not None and rows.dtype == torch.float32:
            by_head.addmm_(self._dense.T, rows)
        elif self._dense is not None:
            for part, of_part in zip(by_head.split(HEAD_ROWS), self._dense.split(HEAD_ROWS, dim=-1), strict=True):
                part += of_part.T @ rows
        exact = rows.float()
        for ids, values in self._sparse:
            local, here = local_ids(ids, len(by_head), group)
            for index, value in zip(local.T, values.masked_fill(~here, 0.0).T, strict=True):
                by_head.index_add_(0, index, value.unsqueeze(-1) * exact)
