"""All ranks write, all ranks get everything: the step's responses, spread over the engines of the world."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from oprd_megatron.parallel.agreement import together
from oprd_megatron.rollout.engine import Rollout, RolloutEngine, SamplingParams, make_requests
from oprd_megatron.rollout.prompts import Prompt


def collect_rollouts(
    engine: RolloutEngine | None, prompts: list[Prompt], responses_per_prompt: int, params: SamplingParams, step: int
) -> list[Rollout]:
    """Every engine writes its share; every rank gets all, in the order of the prompts. Collective.

    Which rank writes a response does not change it (see `engine`). `engine` is None on ranks that hold none.
    """
    requests = make_requests(prompts, responses_per_prompt)
    has_engine: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(has_engine, engine is not None)
    with together("generating rollouts"):
        share = slice(sum(has_engine[: dist.get_rank()]), None, sum(has_engine))
        mine = engine.generate(requests[share], params, step) if engine else []
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    return sorted((rollout for share in shares for rollout in share), key=lambda rollout: rollout.sample_index)
