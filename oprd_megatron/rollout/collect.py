"""Some ranks hold an engine, all ranks get what it writes."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from oprd_megatron.parallel.activity import here
from oprd_megatron.parallel.agreement import together
from oprd_megatron.rollout.engine import Generation, Rollout, RolloutEngine, SamplingParams, make_requests
from oprd_megatron.rollout.prompts import Prompt


def collect_rollouts(
    engine: RolloutEngine | None, prompts: list[Prompt], responses_per_prompt: int, params: SamplingParams, step: int
) -> list[Rollout]:
    """Every engine writes its share; every rank gets all, in the order of the prompts. Collective.

    Which rank writes a response does not change it (see `engine`). `engine` is None on ranks that hold none; ranks whose
    engines write together have the same share, and the first of them speaks.
    """
    requests, held = make_requests(prompts, responses_per_prompt), _who_holds(engine)
    replicas, rank = list(dict.fromkeys(replica for replica in held if replica is not None)), dist.get_rank()
    own = held[rank]
    with together("generating rollouts"):
        mine: list[Rollout] = []
        if engine is not None and own is not None:
            mine = engine.generate(requests[replicas.index(own) :: len(replicas)], params, step)
    shares: list[Any] = [None] * dist.get_world_size()
    with here.waiting():
        dist.all_gather_object(shares, mine if held.index(own) == rank else [])
    return sorted((rollout for share in shares for rollout in share), key=lambda rollout: rollout.sample_index)


def holder_of(engine: RolloutEngine | None) -> int:
    """The rank that holds the only engine of the world. Collective."""
    holders = [rank for rank, replica in enumerate(_who_holds(engine)) if replica is not None]
    assert len(holders) == 1, f"{len(holders)} ranks hold an engine, but one is to write for all"
    return holders[0]


def from_holder(holder: int, generation: Generation | None, min_tokens: int | None) -> tuple[list[Rollout], bool]:
    """Finished responses, as `Generation.take` gives them on the rank `holder`, on every rank; and whether they are the last.
    Collective."""
    with together("generating rollouts"):
        found = [] if generation is None else generation.take(min_tokens)
    parcel: list[Any] = [None if generation is None else (found, generation.is_taken)]
    with here.waiting():
        dist.broadcast_object_list(parcel, src=holder)
    return parcel[0]


def _who_holds(engine: RolloutEngine | None) -> list[tuple[str, int] | None]:
    """For each rank which engine it has a part of; None if it has none."""
    mine = None
    if engine is not None:
        mine = ("rank", dist.get_rank()) if engine.replica is None else ("replica", engine.replica)
    held: list[Any] = [None] * dist.get_world_size()
    with here.waiting():
        dist.all_gather_object(held, mine)
    return held
