"""A real vLLM server for tests, and what it is asked."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from oprd_megatron.config.rollout import ServerConfig, VLLMConfig
from oprd_megatron.errors import UserError
from oprd_megatron.rollout.vllm.processes import ServerProcess, start_server, wait_ready

CHECKOUT = Path(__file__).parents[2]
MODEL = CHECKOUT / "models/smollm2-135m-instruct"
CONTEXT = 1024


def vllm_python() -> Path:
    """Python of an environment with vLLM; the test is skipped where there is none."""
    python = Path(os.environ.get("OPRD_VLLM_PYTHON", CHECKOUT / ".venv-vllm/bin/python"))
    if not python.is_file():
        pytest.skip(f"no vLLM in {python}: run bash tools/install_vllm_cpu.sh, or set OPRD_VLLM_PYTHON")
    return python


def smollm2() -> Path:
    """The real model; the test is skipped where it has not been made."""
    if not (MODEL / "config.json").is_file():
        pytest.skip(f"no {MODEL}: run bash tools/quickstart.sh, which makes it")
    return MODEL


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def running_server(model_dir: Path, folder: Path, context: int = CONTEXT) -> Iterator[ServerProcess]:
    """A server that is ready, on loopback, fp32."""
    server = start_server(
        model_dir,
        VLLMConfig(enforce_eager=True),
        ServerConfig(python=vllm_python()),
        "127.0.0.1",
        free_port(),
        folder / "server.log",
        "fp32",
        context,
        seed=0,
    )
    try:
        wait_ready([server], 300)
        yield server
    finally:
        server.stop()


class Http:
    """Commands and questions to one server."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.commands: list[str] = []
        """Paths that were posted to."""

    def post(self, path: str, body: dict | None, seconds: float) -> dict:
        self.commands.append(path)
        return self._read(httpx.post(self.url + path, json=body, timeout=seconds))

    def get(self, path: str, seconds: float) -> dict:
        return self._read(httpx.get(self.url + path, timeout=seconds))

    def greedy(self, prompt_ids: list[int], num_tokens: int) -> list[int]:
        """Token ids of the greedy continuation."""
        choice = self._complete(prompt_ids, num_tokens, return_token_ids=True)
        return choice["token_ids"]

    def score(self, token_ids: list[int]) -> list[float]:
        """Log-probability of each token but the first."""
        choice = self._complete(token_ids, 1, prompt_logprobs=0)
        entries = choice["prompt_logprobs"][1:]
        return [entry[str(token)]["logprob"] for entry, token in zip(entries, token_ids[1:], strict=True)]

    def cached_tokens(self) -> float:
        """Prompt tokens found in the prefix cache so far."""
        text = httpx.get(self.url + "/metrics", timeout=60).text
        values = [line.split()[-1] for line in text.splitlines() if line.startswith("vllm:prefix_cache_hits_total")]
        return sum(map(float, values))

    def _complete(self, prompt_ids: list[int], num_tokens: int, **more: object) -> dict:
        body = {"prompt": prompt_ids, "max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True, **more}
        return self.post("/v1/completions", body, 120)["choices"][0]

    def _read(self, response: httpx.Response) -> dict:
        if response.status_code != 200:
            raise UserError(f"{self.url}: HTTP {response.status_code}: {response.text}")
        return response.json() if response.content else {}


def wait_until(is_so: object, seconds: float, what: str) -> None:
    """Wait for `is_so()`."""
    deadline = time.monotonic() + seconds
    while not is_so():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.05)
