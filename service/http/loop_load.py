"""Measures how far the event loop is behind, and refuses requests that it could not answer in time.

Where reading and answering requests is the limit, and not the engine, requests wait in sockets and between the steps of
their handling, which the engine's queue does not show. `RequestGate` decides; this class has the clock, the timer and
the counts.
"""

from __future__ import annotations

import asyncio
import time

from service.errors import Overloaded
from service.http.open_requests import OpenRequests
from service.scheduling.request_gate import MIN_LAG_S, RequestGate

BEAT_S = 0.05
"""Seconds between two measurements, while requests are open."""


class LoopLoad:
    """The load of the event loop of one replica; used on that loop alone.

    Args:
        open_requests: all that are not answered.
    """

    def __init__(self, open_requests: OpenRequests) -> None:
        self.num_receiving = 0
        """Requests that wait for bytes of their body."""
        self._gate = RequestGate()
        self._open_requests = open_requests
        self._num_finished = 0
        self._is_beating = False
        self._last_lag_s = 0.0
        self._due = self._began = self._began_cpu = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def lag_s(self) -> float:
        """How late the loop is, in seconds: a request that it sees now has waited about as long in its socket."""
        if not self._is_beating:
            return 0.0
        return max(self._last_lag_s, time.monotonic() - self._due)

    @property
    def waited_s(self) -> float:
        """How long a request has waited that the service sees now; 0 where the loop is not behind."""
        lag_s = self.lag_s
        return lag_s if lag_s >= MIN_LAG_S else 0.0

    def begin(self) -> None:
        """Note that a request is open."""
        if not self._is_beating:
            self._is_beating = True
            self._last_lag_s = 0.0
            self._start_interval()

    def finish(self) -> None:
        """Note that a request, which is still counted as open, was answered.

        After the last one nothing is measured: a loop that does not run then, because the process is stopped for
        example, lets no request wait that it has seen.
        """
        self._num_finished += 1
        if self._is_beating and self._timer is not None and self._open_requests.num_open <= 1:
            self._timer.cancel()
            self._end_interval()
            self._is_beating = False

    def unread_refusal(self) -> Overloaded | None:
        """Why a request whose deadline is not known yet is refused: even the longest recent one would be missed."""
        if not self._is_beating:
            return None
        timeout_s = self._gate.longest_timeout_s(time.monotonic())
        return None if timeout_s is None else self._refusal(self._num_waiting(), timeout_s, self.lag_s)

    def note_timeout(self, timeout_s: float) -> None:
        """Remember the deadline of a request that was read, in seconds from its arrival."""
        self._gate.note_timeout(timeout_s, time.monotonic())

    def refuse_late(self, timeout_s: float, waited_s: float) -> None:
        """Refuse a request that was read, if it cannot be answered before its deadline.

        Args:
            timeout_s: its deadline, from its arrival.
            waited_s: how long it had waited when the service saw it.

        Raises:
            Overloaded: it cannot.
        """
        refusal = self._refusal(self._num_waiting() - 1, timeout_s, waited_s)
        if refusal is not None:
            raise refusal

    def _refusal(self, num_waiting: int, timeout_s: float, waited_s: float) -> Overloaded | None:
        excess_s = self._gate.excess_s(num_waiting, waited_s, timeout_s)
        if not excess_s:
            return None
        return Overloaded(f"{num_waiting} requests are open, so the answer would come too late.", excess_s)

    def _num_waiting(self) -> int:
        return max(0, self._open_requests.num_open - self.num_receiving)

    def _start_interval(self) -> None:
        self._began, self._began_cpu, self._num_finished = time.monotonic(), time.thread_time(), 0
        self._due = self._began + BEAT_S
        self._timer = asyncio.get_running_loop().call_later(BEAT_S, self._beat)

    def _beat(self) -> None:
        self._end_interval()
        self._is_beating = self._open_requests.num_open > 0
        if self._is_beating:
            self._start_interval()

    def _end_interval(self) -> None:
        now = time.monotonic()
        self._last_lag_s = max(0.0, now - self._due)
        self._gate.record(
            self._num_finished,
            elapsed_s=now - self._began,
            cpu_s=time.thread_time() - self._began_cpu,
            lag_s=self._last_lag_s,
        )
