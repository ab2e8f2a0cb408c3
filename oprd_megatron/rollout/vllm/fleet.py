"""Several servers as one: a thread that talks to them, and which of them can be used. How requests are spread: `dispatch`."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Sequence

from oprd_megatron.config.rollout import ServerConfig
from oprd_megatron.rollout.engine import Request, SamplingParams
from oprd_megatron.rollout.sampling import sample_seed
from oprd_megatron.rollout.vllm.client import ServerClient, ServerError
from oprd_megatron.rollout.vllm.dispatch import (
    CHECK_SECONDS,
    LONGEST_WAIT_SECONDS,
    Dispatcher,
    Question,
    Server,
    health_error,
    no_server,
)
from oprd_megatron.rollout.vllm.writing import Writing

CLOSE_SECONDS = 10.0


class Fleet:
    """Servers, and which of them can be used.

    Args:
        clients: one a server.
        settings: rollout.server.
        timeout_seconds: rollout.timeout_seconds: what is not done so long after `start` is cut where it is.
        untaken_limit: finished response tokens, not taken, above which nothing new is sent; None, twice what all servers
            may be asked.
    """

    def __init__(
        self,
        clients: Sequence[ServerClient],
        settings: ServerConfig,
        timeout_seconds: float | None = None,
        untaken_limit: int | None = None,
    ) -> None:
        self.settings, self.timeout_seconds = settings, timeout_seconds
        self.untaken_limit = untaken_limit or 2 * settings.inflight_tokens * len(clients)
        self._servers = [Server(client) for client in clients]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-servers", daemon=True)
        self._thread.start()
        self._under_way: Writing | None = None

    @property
    def alive(self) -> list[ServerClient]:
        """Servers that hold the weights, or are believed to."""
        return [server.client for server in self._servers if server.is_alive]

    @property
    def is_writing(self) -> bool:
        """Whether a generation has responses that were not taken."""
        return self._under_way is not None and not self._under_way.is_over

    def start(self, requests: Sequence[Request], params: SamplingParams, step: int, version: int) -> Writing:
        """Begin to write; one generation at a time. `version` is what the servers were last given."""
        assert not self.is_writing, "the last generation is not taken"
        assert len({request.sample_index for request in requests}) == len(requests), "sample indices repeat"
        patience = (self.settings.retries + 1) * (self.settings.request_seconds + LONGEST_WAIT_SECONDS + CHECK_SECONDS)
        writing = Writing(len(requests), self.untaken_limit, patience)
        questions = [
            Question(request, params, sample_seed(params.seed, step, request.sample_index)) for request in requests
        ]
        deadline = None if self.timeout_seconds is None else writing.started + self.timeout_seconds
        rng = random.Random(f"{params.seed} {step}")
        dispatcher = Dispatcher(self.settings, self._servers, questions, version, writing, deadline, rng)
        task = asyncio.run_coroutine_threadsafe(dispatcher.run(), self._loop)
        writing.wake = lambda: self._loop.call_soon_threadsafe(dispatcher.changed.set)
        writing.stop = task.cancel
        self._under_way = writing
        return writing

    def revive(self) -> list[ServerClient]:
        """Servers to give weights to: those in use, and those set aside that are well again. `keep` says who took them."""
        assert not self.is_writing, "servers come back between generations"

        async def ask() -> list[ServerError | None]:
            return await asyncio.gather(*(health_error(server, self.settings) for server in self._servers))

        errors = asyncio.run_coroutine_threadsafe(ask(), self._loop).result()
        for server, error in zip(self._servers, errors, strict=True):
            if error is not None:
                server.set_aside(error)
        well = [server.client for server, error in zip(self._servers, errors, strict=True) if error is None]
        if not well:
            raise no_server(self._servers)
        return well

    def keep(self, clients: Sequence[ServerClient], errors: dict[str, str]) -> None:
        """These took the last weights and are used; the others are set aside. `errors`: reasons, by url.

        Raises:
            UserError: there are none.
        """
        for server in self._servers:
            server.is_alive = server.client in clients
            if not server.is_alive:
                server.last_error = errors.get(server.client.url, server.last_error)
        if not clients:
            raise no_server(self._servers)

    def close(self) -> None:
        """Stop what is being written and end the thread."""
        if self._loop.is_closed():
            return

        async def end() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*(server.client.close_streams() for server in self._servers))

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(CLOSE_SECONDS)
        if self._under_way is not None:
            self._under_way.wake = self._under_way.stop = lambda: None
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_SECONDS)
        self._loop.close()
        for server in self._servers:
            server.client.close()
