"""Some ranks hold an engine, all ranks get what it writes."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from oprd_megatron.parallel.agreement import together
from oprd_megatron.rollout.engine import Generation, Rollout, RolloutEngine, SamplingParams, make_requests
from oprd_megatron.rollout.prompts import Prompt


def collect_rollouts(
    engine: RolloutEngine | None, prompts: list[Prompt], responses_per_prompt: int, params: SamplingParams, step: int
) -> list[Rollout]:
    """Every engine writes its share; every rank gets all, in the order of the prompts. Collective.

    Which rank writes a response does not change it (see `engine`). `engine` is None on ranks that hold none.
    """
    requests = make_requests(prompts, responses_per_prompt)
    has_engine = _who_holds(engine)
    with together("generating rollouts"):
        share = slice(sum(has_engine[: dist.get_rank()]), None, sum(has_engine))
        mine = engine.generate(requests[share], params, step) if engine else []
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    return sorted((rollout for share in shares for rollout in share), key=lambda rollout: rollout.sample_index)


def holder_of(engine: RolloutEngine | None) -> int:
    """The rank that holds the only engine of the world. Collective."""
    has_engine = _who_holds(engine)
    assert sum(has_engine) == 1, f"{sum(has_engine)} ranks hold an engine, but one is to write for all"
    return has_engine.index(True)


def from_holder(holder: int, generation: Generation | None, min_tokens: int | None) -> tuple[list[Rollout], bool]:
    """Finished responses, as `Generation.take` gives them on the rank `holder`, on every rank; and whether they are the last.
    Collective."""
    with together("generating rollouts"):
        found = [] if generation is None else generation.take(min_tokens)
    parcel: list[Any] = [None if generation is None else (found, generation.is_taken)]
    dist.broadcast_object_list(parcel, src=holder)
    return parcel[0]


def _who_holds(engine: RolloutEngine | None) -> list[bool]:
    held: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(held, engine is not None)
    return held
