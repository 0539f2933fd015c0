"""Admission: whether more work may be queued, and after which delay a refused caller should retry.

Pure: no clock and no lock. A request is admitted with an estimate of its tokens, because tokenizing first would make an
overload expensive.
"""

from __future__ import annotations

from collections.abc import Hashable

from service.errors import Overloaded

THROUGHPUT_HALF_LIFE_S = 10.0
"""Engine seconds after which a measurement of the throughput has half its weight."""

DEFAULT_RETRY_AFTER_S = 1.0
"""``retry_after_s`` of a refusal where no throughput has been measured yet."""


class Throughput:
    """Recent tokens per engine second: a mean with exponentially decaying weights."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """None until something was measured."""
        return self._tokens / self._seconds if self._seconds > 0 else None

    def record(self, num_tokens: int, seconds: float) -> None:
        """Add one batch: the tokens of its sequences, and its seconds of engine time."""
        decay = 0.5 ** (seconds / THROUGHPUT_HALF_LIFE_S)
        self._tokens = self._tokens * decay + num_tokens
        self._seconds = self._seconds * decay + seconds


class Admission:
    """Reservations of requests whose tokens are not counted yet.

    Args:
        max_waiting_tokens: requests that would exceed it are refused.
    """

    def __init__(self, max_waiting_tokens: int) -> None:
        self.throughput = Throughput()
        self.num_reserved_tokens = 0
        self._max_waiting_tokens = max_waiting_tokens
        self._reserved: dict[Hashable, int] = {}

    def reserve(self, request: Hashable, num_tokens: int, num_queued_tokens: int) -> None:
        """Reserve room for a request; O(1), because under overload nothing else is done for it.

        If the queue is empty, any request is admitted, so that no legal request is refused permanently.

        Args:
            request: a key without a reservation.
            num_tokens: an estimate of the request's tokens.
            num_queued_tokens: tokens in the queue, reservations not included.

        Raises:
            Overloaded: the waiting tokens would exceed the limit. ``retry_after_s`` is the time in which the engine, at
                its recent throughput, computes the excess, or all that waits if that is less.
        """
        waiting = self.num_reserved_tokens + num_queued_tokens
        excess = waiting + num_tokens - self._max_waiting_tokens
        if waiting and excess > 0:
            raise Overloaded(
                f"{waiting} tokens wait and {num_tokens} more were sent; the limit is {self._max_waiting_tokens}.",
                retry_after_s=self._seconds_for(min(excess, waiting)),
            )
        self._reserved[request] = num_tokens
        self.num_reserved_tokens += num_tokens

    def release(self, request: Hashable) -> None:
        """End the reservation of a request, if it has one."""
        self.num_reserved_tokens -= self._reserved.pop(request, 0)

    def _seconds_for(self, num_tokens: int) -> float:
        tokens_per_s = self.throughput.tokens_per_s
        return num_tokens / tokens_per_s if tokens_per_s else DEFAULT_RETRY_AFTER_S
