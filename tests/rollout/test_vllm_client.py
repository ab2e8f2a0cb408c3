"""What is asked of a server for one response, and which answers are refused. The real server: tools/kill_servers.py."""

from __future__ import annotations

import json

import pytest

from oprd_megatron.rollout.engine import SamplingParams
from oprd_megatron.rollout.vllm.client import (
    MalformedReply,
    RequestRefused,
    ResponseCheck,
    ServerClient,
    ServerError,
    ServerGone,
    Vocabulary,
    completion_body,
)
from tests.rollout.stub_server import StubServer, free_port

VOCABULARY = Vocabulary(10, (2, 7))


def test_nothing_is_left_to_the_server() -> None:
    """Every option that vLLM would otherwise take from a generation_config.json is in the request."""
    body = completion_body([1, 2], SamplingParams(temperature=0.7, top_p=0.9, stop=("x",)), 5, VOCABULARY)
    from_generation_config = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
    penalties = {"presence_penalty", "frequency_penalty"}
    assert all(body[name] is not None for name in from_generation_config | penalties)
    assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"]) == (0.7, 0.9, 0, 0.0)
    assert body["stop_token_ids"] == [2, 7] and body["stop"] == ["x"] and body["prompt"] == [1, 2]


@pytest.mark.parametrize("seed", [0, 5, 2**63 - 1, 2**63, 2**64 - 1])
def test_seed_is_one_that_vllm_takes(seed: int) -> None:
    """An int64, and never -1, which vLLM reads as no seed."""
    body = completion_body([1], SamplingParams(), seed, VOCABULARY)
    assert 0 <= body["seed"] < 2**63


def test_ids_above_the_limit_are_ruled_out() -> None:
    assert completion_body([1], SamplingParams(), 0, VOCABULARY)["logit_bias"] is None
    body = completion_body([1], SamplingParams(vocab_size=8), 0, VOCABULARY)
    assert body["logit_bias"] == {"8": -100.0, "9": -100.0}
    with pytest.raises(MalformedReply, match="token id 8 is not an integer below 8"):
        ResponseCheck("u", SamplingParams(vocab_size=8), VOCABULARY).read(event([8]))


def event(ids: list[int], ended: str | None = None, stop_reason: str | int | None = None) -> str:
    logprobs = {"token_logprobs": [-1.0] * len(ids)}
    choice = {"token_ids": ids, "logprobs": logprobs, "finish_reason": ended, "stop_reason": stop_reason}
    return json.dumps({"choices": [choice]})


@pytest.mark.parametrize(
    "events",
    [
        [event([3, 4]), event([2], "stop")],
        [event([3, 4]), event([7], "stop", 7)],
        [event([3, 4]), event([5], "stop", "a stop string")],
        [event([3, 4]), event([2]), event([], "stop")],
        [event([3, 4, 5, 6], "length")],
    ],
)
def test_good_answers(events: list[str]) -> None:
    check = ResponseCheck("u", SamplingParams(max_response_tokens=4), VOCABULARY)
    assert [check.read(each).ended is not None for each in events] == [False] * (len(events) - 1) + [True]


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([event([3]), event([], "stop")], "ended with token 3"),
        ([event([], "stop")], "a response of 0 tokens"),
        ([event([3, 4]), event([5, 6, 8])], "5 tokens, where 1 to 4"),
        ([event([3, 4], "length")], "cut at 2 tokens, not 4"),
        (["[]"], "not what vLLM"),
        (["17"], "not what vLLM"),
        (["null"], "not what vLLM"),
        (['{"choices": []}'], "not what vLLM"),
        (['{"choices": [{"token_ids": 3}]}'], "not what vLLM"),
    ],
)
def test_bad_answers(events: list[str], said: str) -> None:
    check = ResponseCheck("u", SamplingParams(max_response_tokens=4), VOCABULARY)
    with pytest.raises(MalformedReply, match=said):
        for each in events:
            check.read(each)


def test_errors_name_server_and_reason() -> None:
    """A dead server, a wrong route and a failing one are told apart."""
    gone = ServerClient(f"http://127.0.0.1:{free_port()}/", VOCABULARY)
    with pytest.raises(ServerGone, match=r"http://127.0.0.1:\d+: /health: "):
        gone.get("/health", 5)
    stub = StubServer(free_port(), health=503)
    try:
        client = ServerClient(stub.url, VOCABULARY)
        with pytest.raises(RequestRefused, match="/nowhere gave HTTP 404: Not Found"):
            client.post("/nowhere", None, 5)
        with pytest.raises(ServerError, match="/health gave HTTP 503: nothing"):
            client.get("/health", 5)
        stub.say(health=200)
        assert client.get("/health", 5) == {}
    finally:
        stub.kill()
