"""vLLM servers as an engine: weights to all of them, scores, who is left after a failure. Stub servers, a sender that only
counts; the real server is in test_vllm_sync.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from oprd_megatron.config.rollout import RolloutConfig
from oprd_megatron.errors import UserError, WeightSyncError
from oprd_megatron.rollout.engine import Request, SamplingParams
from oprd_megatron.rollout.prompts import Prompt
from oprd_megatron.rollout.vllm.client import MalformedReply, ServerClient, Vocabulary
from oprd_megatron.rollout.vllm.scoring import score_sequence
from oprd_megatron.rollout.vllm.server_engine import ServerEngine
from oprd_megatron.rollout.vllm.weight_transfer import Server, SyncReport
from tests.rollout.stub_server import EOS, MOST_TOKENS, VOCAB_SIZE, StubServer, free_port

PARAMS = SamplingParams(max_response_tokens=MOST_TOKENS)
REQUESTS = [Request(Prompt(index, "", (5, 6, 7)), index) for index in range(8)]


class CountingSender:
    """Tells servers the version, and nothing else; `refusing` urls fail."""

    def __init__(self) -> None:
        self.servers: Sequence[Server] = []
        self.refusing: set[str] = set()
        self.closed = False

    def send(self, version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> SyncReport:
        failed = {}
        for server in self.servers:
            if server.url in self.refusing:
                failed[server.url] = f"{server.url}: no room"
            else:
                server.post("/stub", {"version": str(version)}, 5)
        return SyncReport(version, failed, 0, {})

    def close(self) -> None:
        self.closed = True


class Process:
    stopped = False

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def stubs() -> Iterator[list[StubServer]]:
    started = [StubServer(free_port()), StubServer(free_port())]
    yield started
    for stub in started:
        stub.kill()


@pytest.fixture
def sender() -> CountingSender:
    return CountingSender()


@pytest.fixture
def engine(stubs: list[StubServer], sender: CountingSender) -> Iterator[ServerEngine]:
    clients = [ServerClient(stub.url, Vocabulary(VOCAB_SIZE, (EOS,))) for stub in stubs]
    config = RolloutConfig.model_validate(
        {"engine": "vllm_server", "prompts": {"path": "p.jsonl"}, "server": {"request_seconds": 5}}
    )
    engine = ServerEngine(clients, config, sender)
    yield engine
    engine.close()


def alive(engine: ServerEngine) -> list[str]:
    return [client.url for client in engine.fleet.alive]


def no_tensors() -> Iterator[tuple[str, torch.Tensor]]:
    return iter(())


def test_versions_travel(engine: ServerEngine) -> None:
    """Rollouts carry the version of the last update; before one there is nothing to write with."""
    with pytest.raises(WeightSyncError, match="call update_weights first"):
        engine.generate(REQUESTS, PARAMS, 0)
    for version in (4, 5):
        engine.update_weights(version, no_tensors())
        rollouts = engine.generate(REQUESTS, PARAMS, 0)
        assert [rollout.weight_version for rollout in rollouts] == [version] * len(REQUESTS)
        assert [rollout.sample_index for rollout in rollouts] == list(range(len(REQUESTS)))
    assert engine.last_sync is not None and engine.last_sync.version == 5


def test_no_update_while_writing(engine: ServerEngine) -> None:
    """Weights cannot change under responses; the stream, which other ranks take part in, is read to its end all the same."""
    engine.update_weights(1, no_tensors())
    writing = engine.start(REQUESTS, PARAMS, 0)
    tensors = iter([("a", torch.zeros(1)), ("b", torch.zeros(1))])
    with pytest.raises(WeightSyncError, match="take all first"):
        engine.update_weights(2, tensors)
    assert next(tensors, None) is None
    writing.take()
    engine.update_weights(2, no_tensors())


def test_server_that_takes_no_weights(engine: ServerEngine, stubs: list[StubServer], sender: CountingSender) -> None:
    """It is set aside, with a line; at the next update it is tried again; if nobody takes them that is an error."""
    sender.refusing = {stubs[0].url}
    engine.update_weights(1, no_tensors())
    assert alive(engine) == [stubs[1].url]
    assert len(engine.generate(REQUESTS, PARAMS, 0)) == len(REQUESTS)
    assert stubs[0].say()["num_asked"] == 0
    sender.refusing = set()
    engine.update_weights(2, no_tensors())
    assert alive(engine) == [stub.url for stub in stubs]
    sender.refusing = {stub.url for stub in stubs}
    with pytest.raises(UserError, match=r"no server is left.*no room.*no room"):
        engine.update_weights(3, no_tensors())
    with pytest.raises(WeightSyncError, match="call update_weights first"):
        engine.generate(REQUESTS, PARAMS, 0)


def test_dead_server_comes_back(engine: ServerEngine, stubs: list[StubServer]) -> None:
    """A server that died is given no weights while it is gone, and writes again only after an update."""
    engine.update_weights(1, no_tensors())
    stubs[0].kill()
    engine.update_weights(2, no_tensors())
    assert alive(engine) == [stubs[1].url]
    stubs[0].start()
    assert len(engine.generate(REQUESTS, PARAMS, 0)) == len(REQUESTS)
    assert stubs[0].say()["num_asked"] == 0
    engine.update_weights(3, no_tensors())
    assert alive(engine) == [stub.url for stub in stubs]


def test_all_servers_gone_at_an_update(engine: ServerEngine, stubs: list[StubServer]) -> None:
    for stub in stubs:
        stub.kill()
    tensors = iter([("a", torch.zeros(1))])
    with pytest.raises(UserError, match="no server is left") as error:
        engine.update_weights(1, tensors)
    assert all(stub.url in str(error.value) for stub in stubs)
    assert next(tensors, None) is None
    for stub in stubs:
        stub.start()


def prompt_scores(ids: list[int]) -> Callable[[dict], dict]:
    """vLLM's answers to `score_sequence`: token t has log-probability -t, the last one -0.5 from the cache."""

    def answer(body: dict) -> dict:
        assert body["max_tokens"] == 1 and body["temperature"] == 1.0
        if "prompt_logprobs" in body:
            assert body["prompt"] == ids
            return {"choices": [{"prompt_logprobs": [None, *({str(t): {"logprob": -t}} for t in ids[1:])]}]}
        assert body["prompt"] == ids[:-1] and body["logprob_token_ids"] == ids[-1:]
        return {"choices": [{"logprobs": {"top_logprobs": [{"token_id:1": -9.0, f"token_id:{ids[-1]}": -0.5}]}}]}

    return answer


class AnsweringClient(ServerClient):
    def __init__(self, answer: Callable[[dict], dict]) -> None:
        super().__init__("http://127.0.0.1:1", Vocabulary(VOCAB_SIZE, (EOS,)))
        self.answer = answer

    def post(self, path: str, body: dict | None, seconds: float) -> dict:
        assert path == "/v1/completions" and body is not None
        return self.answer(body)


def test_scores() -> None:
    """All tokens but the last from the prompt's log-probabilities, the last one through the prefix cache."""
    for ids in ([3, 4, 5, 6], [3, 4], [3]):
        found = score_sequence(AnsweringClient(prompt_scores(ids)), ids, 1)
        assert found.dtype == torch.float32
        assert found.tolist() == [*(-float(token) for token in ids[1:-1]), *([-0.5] if len(ids) > 1 else [])]


@pytest.mark.parametrize(
    "reply", [{}, {"choices": []}, {"choices": [{"prompt_logprobs": [None]}]}, {"choices": [None]}]
)
def test_malformed_scores(reply: dict) -> None:
    with pytest.raises(MalformedReply, match="did not give the log-probabilities"):
        score_sequence(AnsweringClient(lambda body: reply), [3, 4, 5], 1)


def test_every_server_is_scored(engine: ServerEngine, stubs: list[StubServer]) -> None:
    """`score_each` asks each server; one that says NaN is heard."""
    engine.update_weights(1, no_tensors())
    for stub, value in zip(stubs, [-1.0, None], strict=True):
        both = {
            "prompt_logprobs": [None, {"4": {"logprob": -7.0}}],
            "logprobs": {"top_logprobs": [{"token_id:4": value}]},
        }
        stub.say(scores={"choices": [both]})
    found = engine.score_each([[3, 4]])
    assert found[stubs[0].url][0].tolist() == [-1.0]
    assert found[stubs[1].url][0].isnan().all()
    assert engine.score([[3, 4]])[0].tolist() == [-1.0]


def test_checksums(engine: ServerEngine, stubs: list[StubServer]) -> None:
    """Of every worker; a server that has none to tell is left out."""
    engine.update_weights(1, no_tensors())
    assert engine.checksums() == {}
    stubs[1].say(held=[{"version": 1, "crc32": {"a": 7}}, {"version": 1, "crc32": {"a": 8}}])
    assert engine.checksums() == {f"{stubs[1].url} worker 0": {"a": 7}, f"{stubs[1].url} worker 1": {"a": 8}}


def test_close(stubs: list[StubServer], sender: CountingSender) -> None:
    """Closing stops the servers that the run started, and frees what updates need."""
    config = RolloutConfig.model_validate({"engine": "vllm_server", "prompts": {"path": "p.jsonl"}})
    process = Process()
    clients = [ServerClient(stub.url, Vocabulary(VOCAB_SIZE, (EOS,))) for stub in stubs]
    engine = ServerEngine(clients, config, sender, [process])
    engine.close()
    assert process.stopped and sender.closed
