"""The queue between the event loop, which puts requests in, and the engine thread, which takes batches out.

What a batch holds is decided in ``scheduling``; this adds the lock, and which request each entry belongs to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from service.errors import HttpError
from service.request_state import QueuedWork
from service.scheduling.budget import BatchBudget
from service.scheduling.flows import Entry
from service.scheduling.packed_batch import NumCachedTokens
from service.scheduling.queue import Queue, TakenBatch


@dataclass(frozen=True, slots=True)
class TakenWork:
    """A batch that left the queue, with the request of each entry."""

    batch: TakenBatch

    computed: tuple[QueuedWork, ...]
    """The request of each entry to compute, in order."""

    expired: tuple[QueuedWork, ...]
    """The request of each expired entry, in order."""


class WorkQueue:
    """The queue between the event loop and the engine thread; all methods but `fail_all` are safe to call from both.

    Args:
        queue: that nobody else uses.
        clock: seconds, monotonic.
    """

    def __init__(self, queue: Queue, clock: Callable[[], float]) -> None:
        self._queue = queue
        self._clock = clock
        self._changed = threading.Condition()
        self._requests: dict[Hashable, QueuedWork] = {}
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens that wait for the engine; those of requests that are being tokenized are estimated."""
        return self._queue.num_waiting_tokens

    @property
    def tokens_per_s(self) -> float | None:
        """The recent throughput of the engine; None until something was measured."""
        return self._queue.tokens_per_s

    @property
    def is_closed(self) -> bool:
        """Whether no batch is taken any more."""
        return self._is_closed

    def oldest_wait_s(self) -> float:
        """Return how long the oldest waiting request has waited; 0 when nothing waits."""
        with self._changed:
            oldest = self._queue.oldest_arrival
        return 0.0 if oldest is None else self._clock() - oldest

    def admit(self, key: Hashable, num_tokens: int, *, deadline: float) -> None:
        """Reserve room for a request with a deadline in seconds of the clock, as `Queue.admit`."""
        with self._changed:
            now = self._clock()
            self._queue.admit(key, num_tokens, now=now, time_left_s=deadline - now)

    def put(self, key: Hashable, state: QueuedWork, *, now: float, deadline: float) -> None:
        """Put the work of a request into the queue and wake the engine thread.

        The caller makes sure that the queue is not closed: nobody would take the work.
        """
        with self._changed:
            self._requests[key] = state
            self._queue.put(key, state.work.sequences, state.work.prefixes, now=now, deadline=deadline)
            self._changed.notify()

    def cancel(self, key: Hashable) -> None:
        """Drop what a request has reserved or waiting, and forget the request."""
        with self._changed:
            self._queue.cancel(key)
            self._requests.pop(key, None)

    def take(self, budget: BatchBudget, num_cached_tokens: NumCachedTokens, *, wait: bool) -> TakenWork | None:
        """Take the next batch.

        Args:
            budget: of one pass.
            num_cached_tokens: as `Queue.take_batch`.
            wait: whether to block while nothing waits.

        Returns:
            The batch; None where nothing waits, and with ``wait`` only once the queue is closed.
        """
        with self._changed:
            while not self._is_closed:
                taken = self._queue.take_batch(self._clock(), budget, num_cached_tokens)
                if taken.entries or taken.expired:
                    return TakenWork(taken, self._requests_of(taken.entries), self._requests_of(taken.expired))
                if not wait:
                    return None
                self._changed.wait()
        return None

    def record_throughput(self, num_tokens: int, seconds: float) -> None:
        """Record how fast the engine was, as `Queue.record_throughput`."""
        with self._changed:
            self._queue.record_throughput(num_tokens, seconds)

    def finish_one_by_one(self) -> None:
        """From now on finish whole requests, as `Queue.finish_one_by_one`."""
        with self._changed:
            self._queue.finish_one_by_one()

    def close(self) -> None:
        """End all taking; what waits stays where it is until it is cancelled."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def fail_all(self, error: Callable[[], HttpError]) -> None:
        """End every request that is not answered with a new error; called on the event loop."""
        for state in list(self._requests.values()):
            state.fail(error())

    def _requests_of(self, entries: Sequence[Entry]) -> tuple[QueuedWork, ...]:
        return tuple(self._requests[entry.request] for entry in entries)
