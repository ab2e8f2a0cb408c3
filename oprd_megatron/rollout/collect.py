"""All ranks write, all ranks get everything: the step's responses, spread over the engines of the world."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from oprd_megatron.parallel.agreement import together
from oprd_megatron.rollout.engine import Rollout, RolloutEngine, SamplingParams, make_requests
from oprd_megatron.rollout.prompts import Prompt


def collect_rollouts(
    engine: RolloutEngine, prompts: list[Prompt], responses_per_prompt: int, params: SamplingParams, step: int
) -> list[Rollout]:
    """Every rank's engine writes its share; every rank gets all, in the order of the prompts. Collective.

    Which rank writes a response does not change it (see `engine`).
    """
    requests = make_requests(prompts, responses_per_prompt)
    with together("generating rollouts"):
        mine = engine.generate(requests[dist.get_rank() :: dist.get_world_size()], params, step)
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    return sorted((rollout for share in shares for rollout in share), key=lambda rollout: rollout.sample_index)
