"""Log-probabilities of given tokens from a server.

vLLM never reads its prefix cache for a request with `prompt_logprobs`, so keys and values of old weights that an update left in
the cache would not show. The last token's comes from a completion of what is before it, which does read the cache: a sequence
that was scored before, of more than a block (16 tokens on GPU, 128 on CPU), shows whether the cache was emptied since.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from oprd_megatron.rollout.vllm.client import MalformedReply, ServerClient

ROUTE = "/v1/completions"
UNTEMPERED = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def score_sequence(client: ServerClient, token_ids: Sequence[int], seconds: float) -> torch.Tensor:
    """Log-probability of each token given those before it.

    Args:
        client: the server.
        token_ids: at least one.
        seconds: longest wait for an answer.

    Returns:
        fp32 `[length - 1]` on CPU, untempered.

    Raises:
        ServerError: the server fails, or its answer is none; NaN is returned as such.
    """
    if len(token_ids) == 1:
        return torch.zeros(0)
    ids = list(token_ids)
    last = {"logprobs": 1, "logprob_token_ids": ids[-1:], "return_tokens_as_token_ids": True}
    from_cache = client.post(
        ROUTE, {"prompt": ids[:-1], **last, **UNTEMPERED}, seconds
    )  # the other would renew the cache
    all_at_once = client.post(ROUTE, {"prompt": ids, "prompt_logprobs": 0, **UNTEMPERED}, seconds)
    try:
        places = _choice(all_at_once)["prompt_logprobs"]
        found = [place[str(token)]["logprob"] for place, token in zip(places[1:-1], ids[1:-1], strict=True)]
        found.append(_choice(from_cache)["logprobs"]["top_logprobs"][0][f"token_id:{ids[-1]}"])
        return torch.tensor([float("nan") if value is None else value for value in found], dtype=torch.float32)
    except (KeyError, IndexError, TypeError, ValueError):
        raise MalformedReply(
            f"{client.url}: {ROUTE} did not give the log-probabilities of a prompt as vLLM 0.32 does; start the server with "
            "`oprd rollout serve`"
        ) from None


def _choice(reply: dict) -> dict[str, Any]:
    return reply["choices"][0]
