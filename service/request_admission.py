"""Admission of requests to a scorer: room in the queue is reserved at once, awaited in order of arrival, or refused.

What there is room for is decided in ``scheduling.admission``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import TypeAlias

from service.errors import HttpError, Overloaded
from service.records import Item, ScoreRequest
from service.scoring_metrics import ScoringMetrics
from service.work_queue import WorkQueue

EstimateTokens: TypeAlias = Callable[[Sequence[Item]], Awaitable[int]]
"""Estimates the tokens of items without tokenizing them."""

ROOM_POLL_S = 0.05
"""Seconds after which a request that waits for room in the queue looks for it again."""


class RequestAdmission:
    """Reserves room in the queue for requests; called on the event loop alone.

    Args:
        queue: the queue.
        max_queue_tokens: tokens that the queue may hold, and that those who wait for room may have.
        refuse_unless_ready: raises where no requests are accepted.
        metrics: count refused requests.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        queue: WorkQueue,
        max_queue_tokens: int,
        refuse_unless_ready: Callable[[], None],
        metrics: ScoringMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._queue = queue
        self._max_queue_tokens = max_queue_tokens
        self._refuse_unless_ready = refuse_unless_ready
        self._metrics = metrics
        self._clock = clock
        self._num_patient_tokens = 0
        self._patience = asyncio.Lock()

    async def reserve(self, request: ScoreRequest, key: Hashable, estimate: EstimateTokens, deadline: float) -> None:
        """Refuse a request before any work, or reserve room for it in the queue.

        A request that ``waits_for_room`` is refused only at its deadline, or where those that wait for room have as
        many tokens as the queue may hold.

        Args:
            request: the request.
            key: the name of the reservation.
            estimate: returns how many tokens of the items the own engine computes.
            deadline: by the clock.

        Raises:
            Overloaded: there is no room.
            HttpError: no requests are accepted.
        """
        try:
            num_tokens = await estimate(request.items)
            try:
                self.reserve_now(key, num_tokens, deadline)
            except Overloaded as refusal:
                if not request.waits_for_room:
                    raise
                await self._wait_for_room(key, num_tokens, deadline, refusal)
        except HttpError as refusal:
            self._metrics.count_refused(refusal, len(request.items))
            raise
        except asyncio.CancelledError:
            self._metrics.count_items(len(request.items), "cancelled")
            raise

    def reserve_now(self, key: Hashable, num_tokens: int, deadline: float) -> None:
        """Reserve room in the queue for a number of tokens, or refuse at once; errors as of ``reserve``."""
        self._refuse_unless_ready()
        self._queue.admit(key, num_tokens, deadline=deadline)

    async def _wait_for_room(self, key: Hashable, num_tokens: int, deadline: float, refusal: Overloaded) -> None:
        """Reserve room once there is some; raise the refusal at the deadline, or if too many tokens wait already."""
        if self._num_patient_tokens and self._num_patient_tokens + num_tokens > self._max_queue_tokens:
            raise refusal
        self._num_patient_tokens += num_tokens
        try:
            # In order of arrival: otherwise a small request would always find room before a large one.
            async with asyncio.timeout(deadline - self._clock()), self._patience:
                while True:
                    try:
                        return self.reserve_now(key, num_tokens, deadline)
                    except Overloaded:
                        await asyncio.sleep(ROOM_POLL_S)
        except TimeoutError:
            raise refusal from None
        finally:
            self._num_patient_tokens -= num_tokens
