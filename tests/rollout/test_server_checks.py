"""Servers that are not there, or were started for something else: one line each, before any model is loaded."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from oprd_megatron.config.rollout import RolloutConfig
from oprd_megatron.errors import UserError
from oprd_megatron.rollout.vllm import server_checks
from oprd_megatron.rollout.vllm.client import ServerClient, Vocabulary
from oprd_megatron.rollout.vllm.server_checks import check_servers
from tests.rollout.stub_server import EOS, VOCAB_SIZE, StubServer, free_port

IDS = [17, 4, 99]
OPTIONS = {"weight_transfer_config": {"backend": "b"}, "model_config": {"logprobs_mode": "processed_logprobs"}}
CONFIG = RolloutConfig.model_validate(
    {"engine": "vllm_server", "prompts": {"path": "p.jsonl"}, "max_response_tokens": 100}
)


@pytest.fixture(scope="module")
def server() -> Iterator[StubServer]:
    stub = StubServer(free_port())
    yield stub
    stub.kill()


def good(student: Path) -> dict:
    return {
        "model": f"/elsewhere/{student.name}",
        "max_model_len": 150,
        "tokens": IDS,
        "dev_mode": True,
        "health": 200,
        "server_info": {"vllm_config": OPTIONS},
    }


def check(url: str, student: Path) -> None:
    def tokenizer(text: str, add_special_tokens: bool) -> dict:
        assert not add_special_tokens
        return {"input_ids": IDS}

    client = ServerClient(url, Vocabulary(VOCAB_SIZE, (EOS,)))
    check_servers([client], student, tokenizer, context=150)  # type: ignore[arg-type]


def test_server_of_the_student_passes(server: StubServer, tmp_path: Path) -> None:
    server.say(**good(tmp_path))
    check(server.url, tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "/elsewhere/another"}, r"serves '/elsewhere/another', and student.path is"),
        ({"max_model_len": 149}, r"context of 149 tokens, but .* has 150; set rollout.vllm.max_model_len: 150"),
        ({"tokens": [17, 4]}, "another tokenizer than .* is 2 tokens there and 3 here"),
        ({"tokens": [17, 4, 98]}, "another tokenizer"),
        ({"tokens": None}, "another tokenizer"),
        ({"dev_mode": False}, "has no routes for weights"),
        ({"server_info": {"vllm_config": {**OPTIONS, "weight_transfer_config": None}}}, "takes no weights"),
        (
            {"server_info": {"vllm_config": {**OPTIONS, "model_config": {"logprobs_mode": "raw_logprobs"}}}},
            "raw_logprobs",
        ),
        ({"server_info": {}}, "/server_info is not as vLLM"),
        ({"health": 503}, "/health gave HTTP 503"),
    ],
)
def test_server_that_does_not_fit(change: dict, said: str, server: StubServer, tmp_path: Path) -> None:
    """The message names the server, what is wrong and what to do."""
    server.say(**{**good(tmp_path), **change})
    with pytest.raises(UserError, match=said) as error:
        check(server.url, tmp_path)
    assert server.url in str(error.value) and "\n" not in str(error.value)
    assert "oprd rollout serve" in str(error.value) or "where it is started" in str(error.value)


def test_unreachable_server(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"http://127.0.0.1:\d+: /health: .*start it with `oprd rollout serve`, or correct"
    ):
        check(f"http://127.0.0.1:{free_port()}", tmp_path)


def test_server_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that takes connections and says nothing: an error after the time limit."""
    monkeypatch.setattr(server_checks, "CHECK_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        begun = time.monotonic()
        with pytest.raises(UserError, match=r"/health was silent for 0.3 s"):
            check(f"http://127.0.0.1:{listener.getsockname()[1]}", tmp_path)
        assert time.monotonic() - begun < 3
