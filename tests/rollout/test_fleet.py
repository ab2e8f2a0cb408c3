"""The dispatcher against stub servers that die, hang, lie and stumble: no prompt lost, none twice, no text changed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

import pytest

from oprd_megatron.config.rollout import ServerConfig
from oprd_megatron.errors import UserError
from oprd_megatron.rollout.engine import Request, Rollout, SamplingParams
from oprd_megatron.rollout.prompts import Prompt
from oprd_megatron.rollout.sampling import sample_seed
from oprd_megatron.rollout.vllm import dispatch
from oprd_megatron.rollout.vllm.client import ServerClient, Vocabulary
from oprd_megatron.rollout.vllm.fleet import Fleet
from tests.rollout.stub_server import EOS, MOST_TOKENS, VOCAB_SIZE, StubServer, free_port, response_of

PARAMS = SamplingParams(max_response_tokens=MOST_TOKENS, seed=7)
VERSION = 3


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture
def stubs() -> Iterator[Callable[..., StubServer]]:
    started: list[StubServer] = []

    def start(**settings: object) -> StubServer:
        started.append(StubServer(free_port(), **{"version": str(VERSION), **settings}))
        return started[-1]

    yield start
    for stub in started:
        stub.kill()


@pytest.fixture
def fleet_of() -> Iterator[Callable[..., Fleet]]:
    made: list[Fleet] = []

    def make(
        *servers: StubServer | str, timeout_seconds: float | None = None, limit: int | None = None, **settings
    ) -> Fleet:
        urls = [server if isinstance(server, str) else server.url for server in servers]
        clients = [ServerClient(url, Vocabulary(VOCAB_SIZE, (EOS,))) for url in urls]
        made.append(Fleet(clients, ServerConfig(**{"request_seconds": 5, **settings}), timeout_seconds, limit))
        return made[-1]

    yield make
    for fleet in made:
        fleet.close()


def requests_of(num: int) -> list[Request]:
    prompts = [Prompt(index, "", tuple(range(10, 20 + index % 7))) for index in range(num)]
    return [Request(prompt, index) for index, prompt in enumerate(prompts)]


def expected(requests: list[Request], step: int = 0) -> list[tuple[int, ...]]:
    """What an undisturbed server writes."""
    seeds = [sample_seed(PARAMS.seed, step, request.sample_index) % 2**63 for request in requests]
    return [tuple(response_of([*r.prompt.token_ids], seed)) for r, seed in zip(requests, seeds, strict=True)]


def assert_all_once(rollouts: list[Rollout], requests: list[Request], step: int = 0) -> None:
    assert [rollout.sample_index for rollout in rollouts] == [request.sample_index for request in requests]
    assert [rollout.prompt_ids for rollout in rollouts] == [request.prompt.token_ids for request in requests]
    assert [rollout.response_ids for rollout in rollouts] == expected(requests, step)


def test_responses_are_whole_and_in_order(stubs, fleet_of) -> None:
    """Ids, log-probabilities, version and end of every response are the server's; the order is the requests'."""
    requests = requests_of(30)
    rollouts = fleet_of(stubs(), stubs()).start(requests, PARAMS, 4, VERSION).take()
    assert_all_once(rollouts, requests, step=4)
    for rollout in rollouts:
        assert rollout.logprobs == tuple(-token / VOCAB_SIZE for token in rollout.response_ids)
        assert rollout.weight_version == VERSION
        assert rollout.finished == (rollout.response_ids[-1] == EOS)
    assert any(rollout.finished for rollout in rollouts)


def test_server_killed_twenty_times(stubs, fleet_of) -> None:
    """kill -9 of one of two servers in the middle of a generation: every prompt exactly once, same texts, the run goes on."""
    servers = [stubs(token_seconds=0.002), stubs(token_seconds=0.002)]
    fleet, requests, num_lost = fleet_of(*servers, inflight_tokens=300), requests_of(24), 0
    for step in range(20):
        victim = servers[step % 2]
        already = victim.say(token_seconds=0.03)["num_asked"]  # slow, so that it is surely in the middle
        writing = fleet.start(requests, PARAMS, step, VERSION)
        victim.wait_until_asked(already + 5)
        victim.kill()
        assert_all_once(writing.take(), requests, step)
        assert writing.is_taken
        num_lost += writing.num_asked_again > 0
        assert len(fleet.alive) == 1
        victim.start()
        fleet.keep(fleet.revive(), {})
        assert len(fleet.alive) == 2
    assert num_lost == 20  # each kill hit something


def test_all_servers_killed(stubs, fleet_of) -> None:
    """One line that names every server, at once."""
    servers = [stubs(token_seconds=0.01), stubs(token_seconds=0.01)]
    writing = fleet_of(*servers).start(requests_of(20), PARAMS, 0, VERSION)
    for server in servers:
        server.wait_until_asked(1)
        server.kill()
    begun = time.monotonic()
    with pytest.raises(UserError, match="no server is left") as error:
        writing.take()
    assert time.monotonic() - begun < 5
    assert all(server.url in str(error.value) for server in servers)
    assert "\n" not in str(error.value)


def test_unreachable_server_is_left_out(stubs, fleet_of) -> None:
    requests = requests_of(5)
    assert_all_once(
        fleet_of(f"http://127.0.0.1:{free_port()}", stubs()).start(requests, PARAMS, 0, VERSION).take(), requests
    )


ONE_LINE = {
    "malformed": "not what vLLM",
    "few_logprobs": "1 tokens came with 0 log-probabilities",
    "nan": "log-probability is NaN",
    "nan_literal": "log-probability is NaN",
    "positive": "log-probability is 0.5",
    "unknown_id": f"token id {VOCAB_SIZE} is not",
    "not_an_id": "token id '7' is not",
    "cut": "cut at 3 tokens, not 40",
    "abort": "finish reason 'abort'",
    "wrong_eos": "none of the student's end-of-sequence",
    "end": "without a finish reason",
    "error": "out of memory",
    "error500": "the engine is unwell",
    "reset": "v1/completions",
    "hang": "silent for 0.3 s",
    "refuse": "this prompt cannot be",
}


@pytest.mark.parametrize("fault", ONE_LINE)
def test_server_that_always_fails(fault: str, stubs, fleet_of) -> None:
    """After its retries: one line with the server and the reason, no hang."""
    stub = stubs(fault=fault)
    fleet = fleet_of(stub, retries=1, request_seconds=0.3 if fault == "hang" else 5)
    begun = time.monotonic()
    with pytest.raises(UserError, match=ONE_LINE[fault]) as error:
        fleet.start(requests_of(1), PARAMS, 0, VERSION).take()
    assert time.monotonic() - begun < 5
    assert stub.url in str(error.value) and "\n" not in str(error.value)
    assert stub.say()["num_asked"] == (1 if fault == "refuse" else 2)


@pytest.mark.parametrize("fault", [fault for fault in ONE_LINE if fault != "refuse"])
def test_failures_are_asked_elsewhere(fault: str, stubs, fleet_of) -> None:
    """A server that fails every request, beside a good one: nothing lost, nothing twice, nothing of the bad answers left."""
    requests = requests_of(12)
    fleet = fleet_of(stubs(fault=fault), stubs(), request_seconds=1 if fault == "hang" else 5)
    writing = fleet.start(requests, PARAMS, 0, VERSION)
    assert_all_once(writing.take(), requests)
    assert writing.num_asked_again > 0


def test_asked_where_it_failed_least(stubs, fleet_of) -> None:
    """Two servers that fail everything do not use up the retries of requests that a third would answer."""
    requests = requests_of(6)
    fleet = fleet_of(stubs(fault="nan"), stubs(fault="nan"), stubs(), retries=2)
    assert_all_once(fleet.start(requests, PARAMS, 0, VERSION).take(), requests)


def test_unwell_server_is_set_aside(stubs, fleet_of) -> None:
    """What it was asked goes elsewhere without waiting for each request to fail."""
    sick, requests = stubs(fault="hang"), requests_of(20)
    fleet = fleet_of(sick, stubs(), request_seconds=1)
    sick.say(health=503)
    writing = fleet.start(requests, PARAMS, 0, VERSION)
    assert_all_once(writing.take(), requests)
    assert len(fleet.alive) == 1
    assert sick.say()["num_asked"] == 10


def test_random_failures(stubs, fleet_of) -> None:
    """Property: whatever part of the requests fails, in whatever way, every request is answered exactly once with its text."""
    faults = [fault for fault in ONE_LINE if fault not in ("refuse", "hang", "error500")] + ["error500"]
    servers = [stubs(fault=faults, fault_share=0.3) for _ in range(3)]
    fleet = fleet_of(*servers, retries=30, inflight_tokens=400)
    for step in range(12):
        rng = random.Random(step)
        for server in servers:
            server.say(fault_share=rng.choice([0, 0.2, 0.6]), fault_after=rng.randrange(6))
        requests = requests_of(rng.randrange(1, 40))
        writing, taken = fleet.start(requests, PARAMS, step, VERSION), []
        while not writing.is_taken:
            taken += writing.take(rng.choice([None, 1, 50, 400]))
        assert_all_once(sorted(taken, key=lambda rollout: rollout.sample_index), requests, step)
        assert writing.take() == []
        fleet.keep(fleet.revive(), {})


def test_tokens_in_flight_are_bounded(stubs, fleet_of) -> None:
    """The servers count: prompt and longest response of what they are asked at a time never exceed the bound, and come near."""
    servers, bound = [stubs(token_seconds=0.001), stubs(token_seconds=0.001)], 200
    requests = requests_of(60)
    assert_all_once(fleet_of(*servers, inflight_tokens=bound).start(requests, PARAMS, 0, VERSION).take(), requests)
    for server in servers:
        assert bound - 60 < server.say()["most_inflight"] <= bound


def test_large_request_is_asked_alone(stubs, fleet_of) -> None:
    server, requests = stubs(), requests_of(5)
    assert_all_once(fleet_of(server, inflight_tokens=20).start(requests, PARAMS, 0, VERSION).take(), requests)
    assert server.say()["most_inflight"] == max(len(r.prompt.token_ids) for r in requests) + MOST_TOKENS


def test_back_pressure(stubs, fleet_of) -> None:
    """While nobody takes, the servers are asked for little more than the limit; a take of all lifts it."""
    server, requests = stubs(), requests_of(100)
    writing = fleet_of(server, inflight_tokens=120, limit=100).start(requests, PARAMS, 0, VERSION)
    time.sleep(0.7)
    asked = server.say()["num_asked"]
    time.sleep(0.3)
    assert asked == server.say()["num_asked"] < 40
    first = writing.take(1)
    assert sum(len(rollout.response_ids) for rollout in first) > 100
    assert_all_once(sorted(first + writing.take(), key=lambda rollout: rollout.sample_index), requests)


def test_part_can_be_taken_early(stubs, fleet_of) -> None:
    """A take of some tokens returns them while others are still being written."""
    requests = requests_of(40)
    writing = fleet_of(stubs(token_seconds=0.01), inflight_tokens=300).start(requests, PARAMS, 0, VERSION)
    first = writing.take(60)
    assert sum(len(rollout.response_ids) for rollout in first) >= 60
    assert len(first) < 40 and not writing.is_taken
    rest = writing.take()
    assert writing.is_taken
    assert_all_once(sorted(first + rest, key=lambda rollout: rollout.sample_index), requests)


def test_time_limit_cuts_responses(stubs, fleet_of) -> None:
    """What is being written is cut where it is; what was not begun has one token; both say that they are not finished."""
    requests = requests_of(12)
    stub = stubs(token_seconds=0.1)
    fleet = fleet_of(stub, timeout_seconds=0.8, inflight_tokens=180)
    begun = time.monotonic()
    rollouts = fleet.start(requests, PARAMS, 0, VERSION).take()
    assert time.monotonic() - begun < 2.5
    cut_where_they_were, cut_at_once = 0, 0
    for rollout, whole in zip(rollouts, expected(requests), strict=True):
        assert rollout.response_ids == whole[: len(rollout.response_ids)]
        assert rollout.logprobs is not None and len(rollout.logprobs) == len(rollout.response_ids)
        assert rollout.finished == (rollout.response_ids == whole and whole[-1] == EOS)
        cut_where_they_were += 1 < len(rollout.response_ids) < len(whole)
        cut_at_once += len(rollout.response_ids) == 1
    assert cut_where_they_were >= 2 and cut_at_once >= 5
    assert stub.say()["fewest_tokens"] == 1  # what comes too late is asked for one token


def test_silent_server_is_left(stubs, fleet_of) -> None:
    """A request without a token for request_seconds is cancelled there, and asked elsewhere."""
    silent, requests = stubs(fault="hang"), requests_of(6)
    writing = fleet_of(silent, stubs(), request_seconds=1).start(requests, PARAMS, 0, VERSION)
    assert_all_once(writing.take(), requests)
    seen = silent.say()
    assert seen["num_left"] == seen["num_asked"] and seen["num_inflight"] == 0


def test_wrong_version_before(stubs, fleet_of) -> None:
    """A server that holds other weights is not asked."""
    stale, requests = stubs(version="2"), requests_of(6)
    assert_all_once(fleet_of(stale, stubs()).start(requests, PARAMS, 0, VERSION).take(), requests)
    assert stale.say()["num_asked"] == 0


def test_wrong_version_after(stubs, fleet_of) -> None:
    """Answers of a server that says afterwards that it holds other weights are thrown away, and asked elsewhere."""
    quiet, good, requests = stubs(token_seconds=0.02), stubs(), requests_of(10)
    fleet = fleet_of(quiet, good)
    writing = fleet.start(requests, PARAMS, 0, VERSION)
    quiet.wait_until_asked(5)
    quiet.say(version="default")
    assert_all_once(writing.take(), requests)
    assert quiet.say()["num_inflight"] == 0
    assert good.say()["num_asked"] == 10
    assert [client.url for client in fleet.alive] == [good.url]


def test_only_wrong_versions(stubs, fleet_of) -> None:
    with pytest.raises(UserError, match=r"holds weights 'default', not version 3; was it started again\?"):
        fleet_of(stubs(version="default")).start(requests_of(2), PARAMS, 0, VERSION).take()


def test_take_does_not_wait_for_ever(stubs, fleet_of) -> None:
    """The wait has a limit and a name, even if a server keeps everybody waiting for its retries."""
    fleet = fleet_of(stubs(fault="hang"), request_seconds=60)
    writing = fleet.start(requests_of(2), PARAMS, 0, VERSION)
    assert writing.patience == 4 * (60 + 30 + 30)
    writing.patience = 0.2
    with pytest.raises(UserError, match="waiting for rollouts: 0 of 2 are there"):
        writing.take()
    assert not fleet.is_writing


def test_close_while_writing(stubs, fleet_of) -> None:
    """Closing ends the requests at the server, and whoever takes is told."""
    stub = stubs(token_seconds=0.05)
    fleet = fleet_of(stub)
    writing = fleet.start(requests_of(8), PARAMS, 0, VERSION)
    stub.wait_until_asked(8)
    fleet.close()
    with pytest.raises(UserError, match="stopped"):
        writing.take()
    time.sleep(0.2)
    assert stub.say()["num_inflight"] == 0
