"""The trainer's own log-probabilities of responses, to prove a weight sync and to see how far the engine's are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from oprd_megatron.models import Model, run_schedule
from oprd_megatron.objectives.final_states import FinalStates, head_log_probs
from oprd_megatron.objectives.vocab_parallel import vocab_parallel_gather
from oprd_megatron.platform import Platform
from oprd_megatron.representation.batch import Sample
from oprd_megatron.representation.feed import micro_batches
from oprd_megatron.representation.placement import arrange


def score(
    model: Model,
    platform: Platform,
    samples: Sequence[Sample],
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """Log-probabilities of all response tokens, sample by sample: [N] fp32 on the CPU of every rank of the model's grid.
    Collective over the grid.

    Data-parallel ranks share the samples; the last stage tells the others.

    Args:
        model: of which.
        platform: of this run.
        samples: prompts and responses.
        temperature: logits are divided by it; 0, which is greedy, counts as 1.
        vocab_size: ids from here on have no probability; left out, the model's.
    """
    layout, groups = model.grid.layout, model.grid.groups
    filled = [*samples, *[samples[-1]] * (-len(samples) % layout.dp)]  # each data-parallel rank gets a contiguous part
    arrangement = arrange([len(sample.ids) for sample in filled], layout, micro_batch_size=1)
    finals = FinalStates(model, filled, arrangement)
    fed = micro_batches([sample.ids for sample in filled], arrangement, model.grid)
    run_schedule(model, platform, fed, forward_only=True, on_output=finals.on_output)
    scores = torch.zeros(sum(len(sample.response_ids) for sample in filled), device=platform.device)
    if model.grid.is_last_stage:
        head = head_log_probs(
            finals.states(),
            model.head_weight,
            vocab_size or model.architecture.vocab_size,
            groups.tp,
            temperature or 1.0,
        )
        chunks = zip(head, finals.target_chunks(), strict=True)
        found = [vocab_parallel_gather(log_probs, ids, groups.tp) for log_probs, ids in chunks]
        scores[torch.from_numpy(finals.tokens()).to(scores.device)] = torch.cat([scores.new_empty(0), *found])
        dist.all_reduce(scores, group=groups.dp_cp)
    if layout.pp > 1:
        dist.broadcast(scores, src=dist.get_global_rank(groups.pp, layout.pp - 1), group=groups.pp)
    return scores[: sum(len(sample.response_ids) for sample in samples)].cpu()
