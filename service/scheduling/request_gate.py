"""The gate before the service: which requests are refused because the event loop, and not the engine, is behind.

Pure: no clock and no event loop. The event loop handles its requests in turns. By Little's law, requests of which ``N``
are there and ``R`` are finished per second of the loop's time take ``N / R`` seconds, whatever their order. What they
wait for the engine is in it: where the loop is behind, the two share the processor and Python's lock.
"""

from __future__ import annotations

MIN_LAG_S = 0.01
"""A loop that is less late than this is not behind, and nothing is refused for its sake."""
HALF_LIFE_S = 2.0
"""Seconds of the loop's time after which a measurement of its speed has half its weight."""
MIN_BEHIND_S = 0.2
"""Seconds of being behind, by weight, from which on only the speed at such times counts."""
MIN_FINISHED = 8
"""Finished requests, by weight, below which the speed is not known."""
USED_SHARE = 0.65
"""Share of the time to a request's deadline within which it must be finished by the estimate: slower ones than the mean
must be in time, too."""
PATIENCE_S = 5.0
"""Seconds for which a deadline is remembered; at most twice as long."""


class _Rate:
    """Requests a second, with exponentially decaying weights."""

    def __init__(self) -> None:
        self.finished = 0.0
        self.seconds = 0.0

    def record(self, num_finished: int, seconds: float) -> None:
        """Add an interval."""
        decay = 0.5 ** (seconds / HALF_LIFE_S)
        self.finished = self.finished * decay + num_finished
        self.seconds = self.seconds * decay + seconds

    @property
    def per_second(self) -> float | None:
        """The rate; None while too few were finished."""
        return self.finished / self.seconds if self.finished >= MIN_FINISHED and self.seconds > 0 else None


class RequestGate:
    """The recent speed of an event loop, and what may be refused because of it."""

    def __init__(self) -> None:
        self._behind = _Rate()
        self._ahead = _Rate()
        self._longest_timeouts = (0.0, 0.0)
        self._timeouts_since = 0.0

    @property
    def requests_per_s(self) -> float | None:
        """Requests finished per second of the loop's time; None while too few were finished."""
        if self._behind.seconds >= MIN_BEHIND_S and (speed := self._behind.per_second) is not None:
            return speed
        return self._ahead.per_second

    def record(self, num_finished: int, *, elapsed_s: float, cpu_s: float, lag_s: float) -> None:
        """Add a short interval.

        Args:
            num_finished: requests answered in it.
            elapsed_s: its length.
            cpu_s: CPU time of the loop's thread in it.
            lag_s: how late the loop was at its end. A loop that was behind has been busy all the time, also while its
                thread waited for a core or for Python's lock; one that was not, for its CPU time.
        """
        if lag_s >= MIN_LAG_S:
            self._behind.record(num_finished, elapsed_s)
        else:
            self._ahead.record(num_finished, min(cpu_s, elapsed_s))

    def note_timeout(self, timeout_s: float, now: float) -> None:
        """Remember the deadline of a request that was read, in seconds from its arrival."""
        earlier, current = self._timeouts(now)
        self._longest_timeouts = earlier, max(current, timeout_s)

    def longest_timeout_s(self, now: float) -> float | None:
        """The longest deadline that was read recently; None if there was none."""
        return max(self._timeouts(now)) or None

    def excess_s(self, num_waiting: int, lag_s: float, timeout_s: float) -> float:
        """How many seconds too late the loop would be with one more request; 0 where it may be accepted.

        Args:
            num_waiting: requests that are not answered, without those that wait for bytes of their client.
            lag_s: how late the loop was when it saw the request, which has waited about as long.
            timeout_s: seconds from its arrival to its deadline; `USED_SHARE` of them may be used.
        """
        speed = self.requests_per_s
        if lag_s < MIN_LAG_S or speed is None:
            return 0.0
        return max(0.0, lag_s + (num_waiting + 1) / speed - USED_SHARE * timeout_s)

    def _timeouts(self, now: float) -> tuple[float, float]:
        """Longest timeout of the previous and of the current period of ``PATIENCE_S``."""
        age = now - self._timeouts_since
        if age >= PATIENCE_S:
            self._longest_timeouts = (self._longest_timeouts[1] if age < 2 * PATIENCE_S else 0.0), 0.0
            self._timeouts_since = now
        return self._longest_timeouts
