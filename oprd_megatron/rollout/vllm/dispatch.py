"""Requests over several servers: none lost, none twice, whatever the servers do.

One event loop in a thread of its own talks to all servers, so that the caller can do something else. What holds for every
request of a generation:

- It waits here until a server has room: prompt and longest response of all that a server was asked stay below
  `inflight_tokens` (a request that is larger than this is asked alone). The server with the most room gets it.
- Nothing new is sent while finished responses that nobody took have more tokens than `untaken_limit` and nobody waits.
- A server that cannot be reached, or does not say that it is well, is set aside, and what it was writing is asked elsewhere at
  once. Other failures (silence, an answer that is none) are asked again after a while, elsewhere if there is a choice,
  `retries` times.
- An answer counts only when its server, asked after the answer was complete, says that it holds the generation's weights. A
  server that restarted quietly would say something else: it is set aside, and its answers are asked elsewhere.

A request is therefore in one place at a time: waiting, with one server, waiting for its server's proof, or handed over.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from oprd_megatron.config.rollout import ServerConfig
from oprd_megatron.errors import UserError
from oprd_megatron.parallel.activity import here
from oprd_megatron.rollout.engine import Request, Rollout, SamplingParams
from oprd_megatron.rollout.vllm.client import RequestRefused, ServerClient, ServerError
from oprd_megatron.rollout.vllm.writing import Writing

logger = logging.getLogger(__name__)

CHECK_SECONDS = 30.0
"""Longest wait for /health and /weight_info."""
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 30.0
"""Before a failed request is asked again: doubled each time, times 0.5 to 1.5."""


@dataclass(eq=False)
class Question:
    """A request on its way."""

    request: Request
    params: SamplingParams
    seed: int
    failures: Counter[Server] = field(default_factory=Counter)
    """How often it failed at each server: asked where it failed least."""

    @property
    def cost(self) -> int:
        """Tokens that a server may have to hold for it."""
        return len(self.request.prompt.token_ids) + self.params.max_response_tokens


@dataclass(eq=False)
class Server:
    """A server as the dispatcher sees it."""

    client: ServerClient
    is_alive: bool = True
    last_error: str = "not asked yet"
    inflight_tokens: int = 0
    asked: dict[Question, asyncio.Task] = field(default_factory=dict)
    """What it is writing."""
    unproven: list[tuple[Question, Rollout]] = field(default_factory=list)
    """Complete answers, in wait for its word on its weights."""
    is_proving: bool = False

    def set_aside(self, error: Exception | str) -> None:
        """Use it no more, until it was given weights."""
        self.last_error = str(error)
        if self.is_alive:
            logger.warning("rollout server set aside: %s", error)
        self.is_alive = False


class Dispatcher:
    """One generation, on the event loop.

    Args:
        settings: rollout.server.
        servers: alive or not.
        questions: all of them.
        version: what the servers' /weight_info must say.
        writing: where answers go.
        deadline: time.monotonic() at which what is being written is cut; None never.
        rng: spreads waits.
    """

    def __init__(
        self,
        settings: ServerConfig,
        servers: list[Server],
        questions: Sequence[Question],
        version: int,
        writing: Writing,
        deadline: float | None,
        rng: random.Random,
    ) -> None:
        self.settings, self.servers, self.version, self.writing = settings, servers, version, writing
        self.deadline, self.rng = deadline, rng
        self.waiting = deque(questions)
        self.again: list[Question] = []
        """Asked before, in vain: first in line."""
        self.changed = asyncio.Event()

    async def run(self) -> None:
        """Until all is handed over, or cannot be."""
        try:
            async with asyncio.TaskGroup() as self.group:
                await asyncio.gather(*(self._check_before(server) for server in self.servers if server.is_alive))
                while not self.writing.is_complete:
                    self.changed.clear()
                    self._send()
                    await self.changed.wait()
        except BaseExceptionGroup as errors:
            self.writing.fail(errors.exceptions[0])
        except BaseException as error:
            self.writing.fail(error if isinstance(error, UserError) else UserError("rollouts were stopped"))
            raise

    async def _check_before(self, server: Server) -> None:
        error = await self._version_error(server)
        if error is not None:
            server.set_aside(error)

    def _send(self) -> None:
        """Ask what there is room for."""
        if not any(server.is_alive for server in self.servers):
            raise no_server(self.servers)
        if self.writing.is_full:
            return
        self.again = [question for question in self.again if not self._ask(question)]
        while self.waiting and self._ask(self.waiting[0]):
            self.waiting.popleft()

    def _ask(self, question: Question) -> bool:
        """Whether a server has room for it, and was asked."""
        alive = [server for server in self.servers if server.is_alive]
        fewest = min(question.failures[server] for server in alive)
        fit = [server for server in alive if question.failures[server] == fewest]
        server = min(fit, key=lambda server: server.inflight_tokens)
        if server.inflight_tokens and server.inflight_tokens + question.cost > self.settings.inflight_tokens:
            return False
        if self._is_late():  # the time is up: it is asked for one token
            question.params = replace(question.params, max_response_tokens=1)
        server.inflight_tokens += question.cost
        server.asked[question] = self.group.create_task(self._answer(server, question, question.cost))
        return True

    async def _answer(self, server: Server, question: Question, cost: int) -> None:
        """Have one response written, and see what came of it."""
        error: ServerError | None = None
        try:
            rollout = await self._write(server, question)
        except RequestRefused:
            raise
        except ServerError as problem:
            error = await health_error(server, self.settings) or await self._version_error(server)
            if error is not None:
                self._lose(server, problem)
                return
            error = problem
        finally:
            server.inflight_tokens -= cost
            self.changed.set()
        del server.asked[question]
        if error is None:
            server.unproven.append((question, rollout))
            if not server.is_proving:
                server.is_proving = True
                self.group.create_task(self._prove(server))
        else:
            await self._wait_after(error, server, question)

    async def _write(self, server: Server, question: Question) -> Rollout:
        """The whole response; once the time is up, what there is of it, at least one token."""
        ids: list[int] = []
        logprobs: list[float] = []
        ended = None
        prompt = question.request.prompt
        stream = server.client.complete(prompt.token_ids, question.params, question.seed, self.settings.request_seconds)
        limit = asyncio.timeout(None)
        try:
            async with limit, aclosing(stream) as pieces:
                async for piece in pieces:
                    here.mark()
                    self.writing.last_token = time.monotonic()
                    ids += piece.token_ids
                    logprobs += piece.logprobs
                    ended = piece.ended
                    if ids and self.deadline is not None and limit.when() is None:
                        limit.reschedule(self.deadline)
        except TimeoutError:
            pass  # of `limit`: a silent server raises ServerError
        return Rollout(
            prompt_index=prompt.index,
            sample_index=question.request.sample_index,
            prompt_ids=prompt.token_ids,
            response_ids=tuple(ids),
            weight_version=self.version,
            finished=ended == "stop",
            logprobs=tuple(logprobs),
        )

    async def _wait_after(self, error: ServerError, server: Server, question: Question) -> None:
        question.failures[server] += 1
        times = question.failures.total()
        if times > self.settings.retries:
            raise UserError(
                f"rollouts: response {question.request.sample_index} failed {times} times, at last: {error}"
            )
        logger.warning("rollouts: response %d is asked again: %s", question.request.sample_index, error)
        wait = min(LONGEST_WAIT_SECONDS / 1.5, FIRST_WAIT_SECONDS * 2 ** (times - 1))
        await asyncio.sleep(wait * self.rng.uniform(0.5, 1.5))
        self._return([question])

    async def _prove(self, server: Server) -> None:
        """Hand over a server's answers, batch by batch, once it says which weights it holds."""
        while server.unproven:
            num = len(server.unproven)
            error = await self._version_error(server)
            if not server.is_alive:
                break
            if error is not None:
                self._lose(server, error)
                break
            self.writing.put([rollout for _, rollout in server.unproven[:num]])
            del server.unproven[:num]
            self.changed.set()
        server.is_proving = False

    def _lose(self, server: Server, error: ServerError) -> None:
        """Set a server aside; what it was asked, and what it cannot prove, goes elsewhere."""
        server.set_aside(error)
        self._return([*server.asked, *(question for question, _ in server.unproven)])
        for task in server.asked.values():
            if task is not asyncio.current_task():
                task.cancel()
        server.asked.clear()
        server.unproven.clear()

    def _return(self, questions: Sequence[Question]) -> None:
        self.writing.num_asked_again += len(questions)
        self.again += questions
        self.changed.set()

    def _is_late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    async def _version_error(self, server: Server) -> ServerError | None:
        try:
            reply = await server.client.fetch("/weight_info", _check_seconds(self.settings))
        except ServerError as error:
            return error
        if reply.get("weight_version") == str(self.version):
            return None
        return ServerError(
            f"{server.client.url}: it holds weights {reply.get('weight_version')!r}, not version {self.version}; was it "
            "started again?"
        )


async def health_error(server: Server, settings: ServerConfig) -> ServerError | None:
    """Why a server cannot be used; None if it says that it is well."""
    try:
        await server.client.fetch("/health", _check_seconds(settings))
    except ServerError as error:
        return error
    return None


def no_server(servers: Sequence[Server]) -> UserError:
    """The error when none is left."""
    said = "; ".join(server.last_error for server in servers)
    return UserError(f"rollout.server: no server is left; the last error of each: {said}; start them again")


def _check_seconds(settings: ServerConfig) -> float:
    return min(CHECK_SECONDS, settings.request_seconds)
