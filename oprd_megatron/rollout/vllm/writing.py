"""Where the servers' thread hands responses over, and the caller takes them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from oprd_megatron.errors import UserError
from oprd_megatron.rollout.engine import Rollout


class Writing:
    """A `Generation`: what the loop's thread hands over, and the caller takes.

    Args:
        num_requests: responses that there will be.
        untaken_limit: see `Fleet`.
        patience: `take` waits no longer (seconds) without a new token.
    """

    def __init__(self, num_requests: int, untaken_limit: int, patience: float) -> None:
        self.num_requests, self.untaken_limit, self.patience = num_requests, untaken_limit, patience
        self.wake: Callable[[], object] = lambda: None
        """Makes the dispatcher look again."""
        self.stop: Callable[[], object] = lambda: None
        """Ends the dispatcher."""
        self.num_asked_again = 0
        """Requests that were asked another time."""
        self.started = self.last_token = time.monotonic()
        self._condition = threading.Condition()
        self._ready: list[Rollout] = []
        self._num_ready = self._num_taken = self._ready_tokens = 0
        self._error: BaseException | None = None
        self._is_awaited = False

    def take(self, min_tokens: int | None = None) -> list[Rollout]:
        """See `Generation.take`.

        Raises:
            UserError: a response cannot be had, or no server has written a token for too long.
        """
        begun = time.monotonic()
        with self._condition:
            self._is_awaited = True
            self.wake()
            try:
                while not self._is_enough(min_tokens):
                    left = max(begun, self.last_token) + self.patience - time.monotonic()
                    if left <= 0:
                        self.stop()
                        self._error = UserError(
                            f"waiting for rollouts: {self._num_ready} of {self.num_requests} are there, and no server has "
                            f"written a token for {self.patience:.0f} s; look at the servers' logs"
                        )
                    elif self._error is None:
                        self._condition.wait(left)
                    if self._error is not None:
                        raise self._error
            finally:
                self._is_awaited = False
            taken, self._ready, self._ready_tokens = self._ready, [], 0
            self._num_taken += len(taken)
        self.wake()
        return sorted(taken, key=lambda rollout: rollout.sample_index)

    @property
    def is_taken(self) -> bool:
        """See `Generation.is_taken`."""
        return self._num_taken == self.num_requests

    @property
    def is_over(self) -> bool:
        """Taken, or failed."""
        return self.is_taken or self._error is not None

    @property
    def is_complete(self) -> bool:
        """Whether all is handed over."""
        return self._num_ready == self.num_requests

    @property
    def is_full(self) -> bool:
        """Whether nothing new should be written before something is taken."""
        with self._condition:
            return not self._is_awaited and self._ready_tokens > self.untaken_limit

    def put(self, rollouts: Sequence[Rollout]) -> None:
        """Hand over."""
        with self._condition:
            self._ready += rollouts
            self._num_ready += len(rollouts)
            self._ready_tokens += sum(len(rollout.response_ids) for rollout in rollouts)
            assert self._num_ready <= self.num_requests
            self._condition.notify_all()

    def fail(self, error: BaseException) -> None:
        """Nothing more will come."""
        with self._condition:
            self._error = error
            self._condition.notify_all()

    def _is_enough(self, min_tokens: int | None) -> bool:
        return self.is_complete or (min_tokens is not None and self._ready_tokens >= min_tokens)
