"""The proof, after every update of an engine's weights, that it writes with the student's.

Engine and trainer give log-probabilities to the same tokens, so a stale, lost or misplaced weight shows as a difference far
above rounding, and the run stops:

    read       a fixed text is scored by every copy of the weights that the engine has
    written    before that, a few tokens are written after the text. It is long, so that an engine with a prefix cache takes the
               text's keys and values from there: a cache that was not emptied holds those of the old weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from checkpoints_conversion.live.weights import stream_hf_weights
from oprd_megatron.errors import WeightSyncError
from oprd_megatron.models import Model
from oprd_megatron.parallel.agreement import together
from oprd_megatron.platform import Platform
from oprd_megatron.representation.batch import Sample
from oprd_megatron.rollout.checksum import checksum
from oprd_megatron.rollout.engine import Request, RolloutEngine, SamplingParams
from oprd_megatron.rollout.prompts import Prompt
from oprd_megatron.rollout.trainer_scores import score

PROBE_TEXTS, PROBE_TOKENS, WRITTEN_TOKENS = 2, 320, 8
"""More than two blocks of vLLM's prefix cache, which are of 16 tokens on GPUs and 128 on CPU."""

PROBE_STEP = 2**31 - 1
"""Step of the probe's requests: no step of a run has it."""


@dataclass(frozen=True)
class Difference:
    """|log p_engine - log p_trainer| over the probe's tokens, in nats: the largest, and the mean."""

    max: float
    mean: float


TOLERANCES = {torch.float32: Difference(1e-3, 1e-3), torch.bfloat16: Difference(0.35, 0.06)}
"""What rounding may make (bf16: as measured for one model in two engines)."""


def make_probe(prompts: Sequence[Prompt], context: int) -> list[Prompt]:
    """Two texts made of training prompts strung together, as long as `context` (tokens of a prompt and its response) allows, at
    most `PROBE_TOKENS`. All but a text's first token are scored, so it has at least two."""
    length = max(2, min(PROBE_TOKENS, context - WRITTEN_TOKENS))
    texts = []
    for number in range(PROBE_TEXTS):
        ids: tuple[int, ...] = ()
        while len(ids) < length:
            for prompt in prompts[number::PROBE_TEXTS] or prompts:
                ids += prompt.token_ids
                if len(ids) >= length:
                    break
        texts.append(Prompt(number, "", ids[:length]))
    return texts


def probe_difference(
    engine: RolloutEngine | None, model: Model, platform: Platform, probe: Sequence[Prompt]
) -> Difference:
    """Engine against trainer on the probe, over all engines and all copies of weights. Collective over the world."""
    texts = [list(prompt.token_ids) for prompt in probe]
    read: list[torch.Tensor] = []
    with together("probing the rollout engine"):
        written = _write(engine, probe) if engine is not None else []  # first: scoring may renew a cache
        if engine is not None:
            read = [torch.cat(scores) for scores in engine.score_each(texts).values()]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [(r.prompt_ids, r.response_ids, r.logprobs) for r in written])
    responses = [response for of_rank in everyone for response in of_rank]
    samples = [Sample(prompt.token_ids[:1], prompt.token_ids[1:]) for prompt in probe]
    samples += [Sample(prompt_ids, response_ids) for prompt_ids, response_ids, _ in responses]
    sums = torch.zeros(3, dtype=torch.float64)  # largest, sum, tokens
    if model.grid.is_member:
        scores = score(model, platform, samples)
        of_texts = scores[: sum(len(ids) - 1 for ids in texts)]
        said = torch.tensor([value for _, _, logprobs in responses for value in logprobs], dtype=scores.dtype)
        sums = _sums([found - of_texts for found in read] + [said - scores[len(of_texts) :]])
    largest, rest = sums[:1].clone(), sums[1:].clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    dist.all_reduce(rest)
    return Difference(float(largest), float(rest[0] / rest[1]))


def check_probe(found: Difference, allowed: Difference, version: int, differing: Sequence[str] = ()) -> None:
    """Stop when engine and trainer are not the same policy. `differing` are weights whose checksums are not the trainer's.

    Raises:
        WeightSyncError: the difference is above what is allowed, or a log-probability is not finite.
    """
    if is_within(found, allowed):
        return
    weights = (
        f"these weights have other checksums than the trainer's: {', '.join(differing[:5])}"
        f"{f' and {len(differing) - 5} more' if len(differing) > 5 else ''}"
        if differing
        else "every weight that it received has the trainer's checksum, so it is wrong since then (a prefix cache that was not "
        "emptied, a tied head, another server's restart)"
    )
    if not math.isfinite(found.max):
        raise WeightSyncError(
            f"weight sync of version {version}: log-probabilities of the probe are not finite; the student's weights hold NaN "
            f"or infinity, or {weights}; start from a sound student or checkpoint"
        )
    raise WeightSyncError(
        f"weight sync of version {version}: engine and trainer differ by {found.max:.3g} nats on the probe, {found.mean:.3g} "
        f"on average (allowed: {allowed.max:g}, {allowed.mean:g}); the engine does not hold the student's weights: {weights}"
    )


def is_within(found: Difference, allowed: Difference) -> bool:
    """Whether both numbers are; NaN is not."""
    return found.max <= allowed.max and found.mean <= allowed.mean


def differing_weights(engine: RolloutEngine | None, model: Model) -> list[str]:
    """Names of weights whose checksum in some engine is not the trainer's, in the model's order. Collective over the world."""
    mine = {}
    if model.grid.is_member:
        groups = model.grid.groups
        stream = stream_hf_weights(model.chunks, model.architecture, model.sharding, groups.tp, groups.pp)
        mine = {name: checksum(tensor) for name, tensor in stream}
    copies = [] if engine is None else list(engine.checksums().values())
    different = [name for name in mine if any(copy.get(name) != mine[name] for copy in copies)]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, different)
    found = {name for names in everyone for name in names}
    order: list[Any] = [list(mine)]
    dist.broadcast_object_list(order, src=model.grid.layout.first_rank)
    return [name for name in order[0] if name in found]


def _write(engine: RolloutEngine, probe: Sequence[Prompt]) -> list[Any]:
    """A few tokens after each text."""
    requests = [Request(prompt, number) for number, prompt in enumerate(probe)]
    return engine.generate(requests, SamplingParams(temperature=0.0, max_response_tokens=WRITTEN_TOKENS), PROBE_STEP)


def _sums(differences: Sequence[torch.Tensor]) -> torch.Tensor:
    """[largest, sum, number] of absolute values; NaN counts as infinite."""
    values = torch.cat(list(differences)).double().abs()
    values = torch.where(values.isnan(), torch.inf, values)
    return torch.stack([values.max(), values.sum(), torch.tensor(float(len(values)), dtype=torch.float64)])
