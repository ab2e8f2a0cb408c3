"""One vLLM server over HTTP: questions and commands with a time limit each, and a completion as a stream of tokens.

The route is POST /v1/completions, with the prompt as token ids and `return_token_ids`: text is never turned into tokens or
back on the way. Everything that decides how a token is drawn is in the request, so that nothing of the generation_config.json
that the server read can leak in; what a request cannot overrule (its longest response, its end-of-sequence tokens) shows in
what comes back and is refused here.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from oprd_megatron.errors import UserError
from oprd_megatron.rollout.engine import SamplingParams

CONNECT_SECONDS = 5.0
IDLE_SECONDS = 2.0
"""An unused connection is closed after so long: before vLLM's HTTP server does it (5 s), so that no request meets a closing
one."""
HIGHEST_LOG_PROB = 1e-3
"""Above 0 by rounding alone."""


class ServerError(UserError):
    """A rollout server did not do what it was asked; the message names its url."""


class ServerGone(ServerError):
    """It cannot be reached, or closed the connection."""


class MalformedReply(ServerError):
    """What came back is not an answer to what was asked."""


class RequestRefused(ServerError):
    """The server holds the request for wrong (HTTP 4xx): it would refuse it again."""


@dataclass(frozen=True)
class Vocabulary:
    """Which ids a response can hold."""

    size: int
    """Ids are below this."""
    eos_ids: tuple[int, ...]
    """End-of-sequence ids: a response ends with the first."""


@dataclass(frozen=True)
class Piece:
    """Some more of a response."""

    token_ids: list[int]
    logprobs: list[float]
    """Of each token, in nats, under the distribution that it was drawn from."""
    ended: str | None
    """stop: at an end-of-sequence token or stop string; length: at max_response_tokens; None: more will come."""


class ServerClient:
    """A vLLM server.

    Args:
        url: http://host:port.
        vocabulary: the student's.
    """

    def __init__(self, url: str, vocabulary: Vocabulary) -> None:
        self.url = url.rstrip("/")
        self.vocabulary = vocabulary
        limits = httpx.Limits(max_connections=None, keepalive_expiry=IDLE_SECONDS)
        self._client = httpx.Client(base_url=self.url, limits=limits, trust_env=False)
        self._stream_client = httpx.AsyncClient(base_url=self.url, limits=limits, trust_env=False)

    def post(self, path: str, body: dict | None, seconds: float) -> dict:
        """POST json, and the json that comes back ({} for an empty reply).

        Raises:
            ServerError: no answer within `seconds`, or not a good one.
        """
        return self._call("POST", path, body, seconds)

    def get(self, path: str, seconds: float) -> dict:
        """GET; as `post`."""
        return self._call("GET", path, None, seconds)

    async def fetch(self, path: str, seconds: float) -> dict:
        """`get` on the fleet's event loop."""
        try:
            async with asyncio.timeout(seconds):
                response = await self._stream_client.get(path, timeout=_timeout(seconds))
        except (TimeoutError, httpx.TransportError) as error:
            raise self._failure(path, error, seconds) from None
        return self._read(response, path)

    async def complete(
        self, prompt_ids: Sequence[int], params: SamplingParams, seed: int, silence_seconds: float
    ) -> AsyncGenerator[Piece, None]:
        """One response, as it is written; the last piece says how it ended. Leaving early makes the server stop.

        Args:
            prompt_ids: the prompt.
            params: how tokens are drawn; its own `seed` is not read.
            seed: the sample's, see `sampling.sample_seed`.
            silence_seconds: longest wait for the next token.

        Raises:
            ServerError: silence, a closed connection, or an answer that is not one.
        """
        path, check = "/v1/completions", ResponseCheck(self.url, params, self.vocabulary)
        body = completion_body(prompt_ids, params, seed, self.vocabulary)
        request = self._stream_client.build_request("POST", path, json=body, timeout=_timeout(None))
        try:
            async with asyncio.timeout(silence_seconds):
                response = await self._stream_client.send(request, stream=True)
            try:
                if response.status_code >= 400:
                    async with asyncio.timeout(silence_seconds):
                        await response.aread()
                    self._read(response, path)
                lines = response.aiter_lines()
                while (event := await _next_event(lines, silence_seconds)) is not None:
                    piece = check.read(event)
                    yield piece
                    if piece.ended:
                        return
            finally:
                await response.aclose()
        except (TimeoutError, httpx.TransportError) as error:
            raise self._failure(path, error, silence_seconds) from None
        raise MalformedReply(f"{self.url}: a response ended without a finish reason; look at the server's log")

    def close(self) -> None:
        """Close the connections of `get` and `post`."""
        self._client.close()

    async def close_streams(self) -> None:
        """Close the connections of `fetch` and `complete`, on the loop that used them."""
        await self._stream_client.aclose()

    def _call(self, method: str, path: str, body: dict | None, seconds: float) -> dict:
        try:
            response = self._client.request(method, path, json=body, timeout=_timeout(seconds))
        except httpx.TransportError as error:
            raise self._failure(path, error, seconds) from None
        return self._read(response, path)

    def _read(self, response: httpx.Response, path: str) -> dict:
        status = response.status_code
        if status >= 400:
            kind = RequestRefused if status < 500 and status not in (408, 429) else ServerError
            raise kind(f"{self.url}: {path} gave HTTP {status}: {_reason(response.text)}")
        if not response.content:
            return {}
        try:
            reply = response.json()
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise MalformedReply(f"{self.url}: {path} did not answer with a JSON object; is this a vLLM server?")
        return reply

    def _failure(self, path: str, error: Exception, seconds: float) -> ServerError:
        if isinstance(error, (TimeoutError, httpx.TimeoutException)) and not isinstance(error, httpx.ConnectTimeout):
            return ServerError(f"{self.url}: {path} was silent for {seconds:g} s")
        return ServerGone(f"{self.url}: {path}: {str(error) or type(error).__name__}")


def completion_body(
    prompt_ids: Sequence[int], params: SamplingParams, seed: int, vocabulary: Vocabulary
) -> dict[str, Any]:
    """The request for one response.

    Ids from `params.vocab_size` on get a bias of -100 on their logit, vLLM's least: e^-100 of a probability is nothing in
    fp32. A list of all allowed ids would be a megabyte a request, and vLLM takes at most 1024 of either.
    """
    limit = vocabulary.size if params.vocab_size is None else params.vocab_size
    return {
        "prompt": list(prompt_ids),
        "max_tokens": params.max_response_tokens,
        "seed": seed % 2**63,  # vLLM takes an int64, and reads -1 as none
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": {str(token): -100.0 for token in range(limit, vocabulary.size)} or None,
        "stop": list(params.stop),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,  # a stop string may be a special token
        "stop_token_ids": list(vocabulary.eos_ids),
        "ignore_eos": False,
        "logprobs": 0,  # of the drawn token alone
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "stream": True,
    }


class ResponseCheck:
    """Reads the events of one response, and refuses what cannot be an answer.

    Args:
        url: the server's, for messages.
        params: what was asked for.
        vocabulary: the student's.
    """

    def __init__(self, url: str, params: SamplingParams, vocabulary: Vocabulary) -> None:
        self.url, self.params, self.vocabulary = url, params, vocabulary
        self.limit = vocabulary.size if params.vocab_size is None else params.vocab_size
        self.num_tokens, self.last_token = 0, -1

    def read(self, event: str) -> Piece:
        """One event of the stream, a JSON object.

        Raises:
            MalformedReply: it is none, or holds ids or log-probabilities that cannot be.
            ServerError: the server says that it failed.
        """
        try:
            found = json.loads(event)
            if "error" in found:
                raise ServerError(f"{self.url}: the server failed: {_reason(event)}")
            choice = found["choices"][0]
            ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            ended, stop_reason = choice["finish_reason"], choice.get("stop_reason")
            counts = len(ids), len(logprobs)
        except (ValueError, KeyError, IndexError, TypeError):
            raise self._malformed(f"a piece of a response is not what vLLM 0.32 sends: {event[:80]!r}") from None
        if counts[0] != counts[1]:
            raise self._malformed(f"{counts[0]} tokens came with {counts[1]} log-probabilities")
        for token in ids:
            if type(token) is not int or not 0 <= token < self.limit:
                raise self._malformed(f"token id {token!r} is not an integer below {self.limit}")
        for value in logprobs:
            if type(value) not in (int, float) or not math.isfinite(value) or value > HIGHEST_LOG_PROB:
                said = "NaN" if value is None or value != value else value  # vLLM writes NaN as null
                raise self._malformed(f"a token's log-probability is {said}; are the weights finite?")
        self.num_tokens += len(ids)
        self.last_token = ids[-1] if ids else self.last_token
        self._check_end(ended, stop_reason)
        return Piece(ids, logprobs, ended)

    def _check_end(self, ended: object, stop_reason: object) -> None:
        most = self.params.max_response_tokens
        if self.num_tokens > most or (ended and not self.num_tokens):
            raise self._malformed(f"a response of {self.num_tokens} tokens, where 1 to {most} were asked for")
        if ended == "length" and self.num_tokens < most:
            raise self._malformed(
                f"a response was cut at {self.num_tokens} tokens, not {most}; start the server with a larger --max-model-len "
                "and --generation-config vllm"
            )
        if ended == "stop" and not isinstance(stop_reason, str) and self.last_token not in self.vocabulary.eos_ids:
            raise self._malformed(
                f"a response ended with token {self.last_token}, which is none of the student's end-of-sequence tokens"
            )
        if ended not in ("stop", "length", None):
            raise self._malformed(f"a response ended with finish reason {ended!r}")

    def _malformed(self, what: str) -> MalformedReply:
        return MalformedReply(f"{self.url}: {what}")


async def _next_event(lines: AsyncIterator[str], seconds: float) -> str | None:
    """The data of the next server-sent event; None at the end. Comments (a server's keep-alive) do not count as one."""
    async with asyncio.timeout(seconds):
        async for line in lines:
            if line.startswith("data:"):
                data = line.removeprefix("data:").strip()
                return None if data == "[DONE]" else data
    return None


def _timeout(seconds: float | None) -> httpx.Timeout:
    return httpx.Timeout(seconds, connect=CONNECT_SECONDS if seconds is None else min(seconds, CONNECT_SECONDS))


def _reason(text: str) -> str:
    """What an error reply says, on one line."""
    try:
        said = json.loads(text)
        error = said.get("error", said.get("detail", said))
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, AttributeError):
        pass
    return " ".join(str(text).split())[:300] or "nothing"
