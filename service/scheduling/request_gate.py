"""The gate before the service: which requests are refused because the event loop, and not the engine, is behind.

Pure: no clock and no event loop. The event loop handles its requests in turns. By Little's law, requests of which ``N``
are there and ``R`` are finished per second of the loop's time take ``N / R`` seconds, whatever their order.
"""

from __future__ import annotations

from service.scheduling.admission import USED_SHARE

MIN_LAG_S = 0.01
"""A loop that is less late than this is not behind, and nothing is refused for its sake."""
HALF_LIFE_S = 1.0
"""Seconds of the loop's time after which a measurement of its speed has half its weight."""
MIN_FINISHED = 8
"""Finished requests, by weight, below which the speed is not known."""
PATIENCE_S = 5.0
"""Seconds for which a deadline is remembered; at most twice as long."""


class RequestGate:
    """The recent speed of an event loop, and what may be refused because of it."""

    def __init__(self) -> None:
        self._finished = 0.0
        self._busy_s = 0.0
        self._longest_timeouts = (0.0, 0.0)
        self._timeouts_since = 0.0

    @property
    def requests_per_s(self) -> float | None:
        """Requests finished per second of the loop's time; None while too few were finished."""
        if self._finished < MIN_FINISHED or self._busy_s <= 0:
            return None
        return self._finished / self._busy_s

    def record(self, num_finished: int, *, elapsed_s: float, cpu_s: float, lag_s: float) -> None:
        """Add a short interval.

        Args:
            num_finished: requests answered in it.
            elapsed_s: its length.
            cpu_s: CPU time of the loop's thread in it.
            lag_s: how late the loop was at its end. A loop that was behind has been busy all the time, also while its
                thread waited for a core or for Python's lock; one that was not, for its CPU time.
        """
        busy_s = elapsed_s if lag_s >= MIN_LAG_S else min(cpu_s, elapsed_s)
        decay = 0.5 ** (busy_s / HALF_LIFE_S)
        self._finished = self._finished * decay + num_finished
        self._busy_s = self._busy_s * decay + busy_s

    def note_timeout(self, timeout_s: float, now: float) -> None:
        """Remember the deadline of a request that was read, in seconds from its arrival."""
        earlier, current = self._timeouts(now)
        self._longest_timeouts = earlier, max(current, timeout_s)

    def longest_timeout_s(self, now: float) -> float | None:
        """The longest deadline that was read recently; None if there was none."""
        return max(self._timeouts(now)) or None

    def excess_s(self, num_waiting: int, lag_s: float, time_left_s: float) -> float:
        """How many seconds too late the loop would be with one more request; 0 where it may be accepted.

        Args:
            num_waiting: requests that the loop has to handle before they can be answered. Those that wait for bytes of
                their client or for the engine are not among them.
            lag_s: how late the loop is; the request has waited so long before the service saw it.
            time_left_s: seconds to its deadline. Half of them may be used (`USED_SHARE`): the engine needs time too.
        """
        speed = self.requests_per_s
        if lag_s < MIN_LAG_S or speed is None:
            return 0.0
        return max(0.0, lag_s + (num_waiting + 1) / speed - USED_SHARE * time_left_s)

    def _timeouts(self, now: float) -> tuple[float, float]:
        """Longest timeout of the previous and of the current period of ``PATIENCE_S``."""
        age = now - self._timeouts_since
        if age >= PATIENCE_S:
            self._longest_timeouts = (self._longest_timeouts[1] if age < 2 * PATIENCE_S else 0.0), 0.0
            self._timeouts_since = now
        return self._longest_timeouts
