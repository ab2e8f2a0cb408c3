"""The trainer's weights into the engine, and the proof that they arrived.

After every update a fixed probe is scored by engine and trainer. Both compute log-probabilities of the same tokens, so a
stale, lost or misplaced weight shows as a difference far above rounding, and the run stops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from checkpoints_conversion.live.weights import stream_hf_weights
from oprd_megatron.errors import WeightSyncError
from oprd_megatron.models import Model, run_schedule
from oprd_megatron.objectives.final_states import FinalStates, head_log_probs
from oprd_megatron.objectives.vocab_parallel import vocab_parallel_gather
from oprd_megatron.platform import Platform
from oprd_megatron.representation.batch import Sample
from oprd_megatron.representation.feed import micro_batches
from oprd_megatron.representation.placement import arrange
from oprd_megatron.rollout.engine import RolloutEngine
from oprd_megatron.rollout.prompts import Prompt

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.35}
"""Largest |log p| difference in nats between engine and trainer (bf16: as measured for one model in two engines)."""

PROBE_PROMPTS, PROBE_TOKENS = 2, 64


def make_probe(prompts: Sequence[Prompt]) -> list[Sample]:
    """Two prompts, cut at 64 tokens; all but the first token are scored, so a prompt of one token is said twice."""
    cut = [prompt.token_ids[:PROBE_TOKENS] for prompt in prompts[:PROBE_PROMPTS]]
    cut = [ids if len(ids) > 1 else ids * 2 for ids in cut]
    return [Sample(ids[:1], ids[1:]) for ids in cut]


def sync_weights(engine: RolloutEngine | None, model: Model, version: int) -> None:
    """Stream the model's tensors under Hugging Face names into this rank's engine, if it holds one. Collective over the
    model's grid."""
    if not model.grid.is_member:
        return
    groups = model.grid.groups
    tensors = stream_hf_weights(model.chunks, model.architecture, model.sharding, groups.tp, groups.pp)
    if engine is not None:
        engine.update_weights(version, tensors)
    for _ in tensors:  # the stream is collective: a rank without an engine takes its part and keeps nothing
        pass


def probe_difference(engine: RolloutEngine | None, model: Model, platform: Platform, probe: Sequence[Sample]) -> float:
    """Largest |log p_engine - log p_trainer| over the probe's tokens and all ranks. Collective over the world."""
    difference = torch.zeros(1)
    from_trainer = score(model, platform, probe) if model.grid.is_member else difference
    if engine is not None:
        from_engine = torch.cat(engine.score([list(sample.ids) for sample in probe]))
        difference = (from_engine - from_trainer).abs().max().reshape(1)
    difference = torch.where(difference.isnan(), torch.inf, difference)
    dist.all_reduce(difference, op=dist.ReduceOp.MAX)
    return float(difference)


def check_probe(difference: float, tolerance: float, version: int) -> None:
    """Stop when engine and trainer are not the same policy.

    Raises:
        WeightSyncError: the difference is above the tolerance, or a log-probability is not finite.
    """
    if not math.isfinite(difference):
        raise WeightSyncError(
            f"weight sync of version {version}: log-probabilities of the probe are not finite; the student's weights hold "
            "NaN or infinity, start from a sound student or checkpoint"
        )
    if not difference <= tolerance:
        raise WeightSyncError(
            f"weight sync of version {version}: engine and trainer differ by {difference:.3g} nats on the probe (allowed: "
            f"{tolerance:g}); the engine does not hold the student's weights"
        )


def score(model: Model, platform: Platform, samples: Sequence[Sample]) -> torch.Tensor:
    """Log-probabilities of all response tokens, sample by sample: [N] fp32 on the CPU of every rank of the model's grid.
    Collective over the grid.

    Every data-parallel rank scores all samples; the last stage tells the others.
    """
    layout, coords, groups = model.grid.layout, model.grid.coords, model.grid.groups
    copies = list(samples) * layout.dp  # each data-parallel rank gets a contiguous part: all samples
    arrangement = arrange([len(sample.ids) for sample in copies], layout, micro_batch_size=1)
    finals = FinalStates(model, copies, arrangement)
    fed = micro_batches([sample.ids for sample in copies], arrangement, model.grid)
    run_schedule(model, platform, fed, forward_only=True, on_output=finals.on_output)
    scores = torch.zeros(sum(len(sample.response_ids) for sample in copies), device=platform.device)
    if model.grid.is_last_stage:
        chunks = zip(
            head_log_probs(finals.states(), model.head_weight, model.architecture.vocab_size, groups.tp),
            finals.target_chunks(),
            strict=True,
        )
        found = torch.cat([vocab_parallel_gather(log_probs, ids, groups.tp) for log_probs, ids in chunks])
        scores[torch.from_numpy(finals.tokens()).to(scores.device)] = found
        if layout.cp > 1:
            dist.all_reduce(scores, group=groups.cp)
    if layout.pp > 1:
        dist.broadcast(scores, src=dist.get_global_rank(groups.pp, layout.pp - 1), group=groups.pp)
    share = len(scores) // layout.dp
    return scores[coords.dp * share : (coords.dp + 1) * share].cpu()
