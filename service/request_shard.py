"""A shard of a large request: the sequences that one replica computes for the replica that received the request.

Only token sequences travel, and only what the engine returns comes back. Everything that needs the whole request
(diagnostics of groups, monitors, metrics of items, the answer) stays with the replica that received it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from reward_client.options import DiagnosticsLevel

from service.diagnostics.item_state import Outcome
from service.errors import HttpError, InternalError
from service.scheduling.work import Work


@dataclass(frozen=True, slots=True)
class RequestShard:
    """What a replica is asked to compute."""

    work: Work = field(repr=False)

    level: DiagnosticsLevel
    """Decides whether hidden states are read."""

    timeout_s: float
    """Seconds that are left until the deadline of the request; not a time of day, since machines' clocks differ."""

    build: str
    """Model version and code of the replica that asks; a replica of another one refuses the shard."""


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What the engine returned for a shard."""

    outcomes: tuple[Outcome, ...] = field(repr=False)
    """For each sequence, in order, a Score as the engine completes it, or its error."""

    shared_tokens: tuple[int, ...] = field(repr=False)
    """For each sequence its tokens that were not computed for it."""

    queue_s: float
    engine_s: float


class ShardState:
    """The results of a shard so far; changed on the event loop only.

    Args:
        work: of the shard.
        level: of the request.
        queued_at: when it was put into the queue, in seconds of the scorer's clock.
    """

    def __init__(self, work: Work, level: DiagnosticsLevel, queued_at: float) -> None:
        self.work = work
        self.level = level
        self.computed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when every sequence has its outcome, or with the error that ends the whole shard."""
        self._outcomes: list[Outcome | None] = [None] * len(work.sequences)
        self._shared_tokens = [0] * len(work.sequences)
        self._num_waiting = len(work.sequences)
        self._queued_at = queued_at
        self._queue_s = 0.0
        self._engine_s = 0.0

    def resolve(self, index: int, outcome: Outcome, shared_tokens: int) -> None:
        """Record the outcome of one sequence; each is resolved once."""
        self._outcomes[index] = outcome
        self._shared_tokens[index] = shared_tokens
        self._num_waiting -= 1
        if not self._num_waiting and not self.computed.done():
            self.computed.set_result(None)

    def record_batch(self, begin: float, engine_s: float) -> None:
        """Record the times of a batch; those of the last one are the times of the slowest sequences."""
        self._queue_s, self._engine_s = begin - self._queued_at, engine_s

    def fail(self, error: HttpError) -> None:
        """End the whole shard with an error, unless it has ended."""
        if not self.computed.done():
            self.computed.set_exception(error)

    def result(self) -> ShardResult:
        """Return what the engine returned, once all of it is there.

        Raises:
            InternalError: some sequence has no outcome.
        """
        outcomes = tuple(outcome for outcome in self._outcomes if outcome is not None)
        if len(outcomes) != len(self._outcomes):
            raise InternalError(f"{len(self._outcomes) - len(outcomes)} sequences of a shard have no outcome.")
        return ShardResult(outcomes, tuple(self._shared_tokens), self._queue_s, self._engine_s)
