"""What a load test sends and when: phases, the streams of requests in them, and the schedule of the open streams.

Pure and seeded: the schedule is computed before the clock starts, so what is sent does not depend on the answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from loadtest.traffic.arrivals import Arrivals
from loadtest.traffic.items import Item, ItemSource


@dataclass(frozen=True, slots=True)
class OpenStream:
    """Requests that start at times fixed in advance, whether or not earlier ones have been answered."""

    name: str
    arrivals: Arrivals
    items_per_request: int = 1

    begin_s: float = 0.0
    """Seconds of the phase before the first request may start."""

    factor: float | None = None
    """The rate as a multiple of the measured capacity, in an overload."""


@dataclass(frozen=True, slots=True)
class ClosedStream:
    """Clients that send their next request as soon as the previous one is answered."""

    name: str
    clients: int
    items_per_request: int = 1


@dataclass(frozen=True, slots=True)
class BurstStream:
    """Batches as of a PPO loop: all requests of a batch start at once, and the trainer waits for the last answer.

    There is at least one batch, however short the phase is.
    """

    name: str
    requests_per_batch: int
    items_per_request: int = 1

    train_s: float = 1.0
    """Seconds between the last answer of a batch and the start of the next batch."""


Stream = OpenStream | ClosedStream | BurstStream


@dataclass(frozen=True, slots=True)
class Phase:
    """A time in which the same streams run."""

    name: str
    duration_s: float
    """Of each stream, from its begin."""
    streams: Sequence[Stream]


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """A request before it is sent."""

    stream: str

    start_s: float
    """Intended start, in seconds from the begin of the phase; of a closed stream and of a burst: 0, set when sent."""

    items: Sequence[Item] = field(repr=False)
    body: bytes = field(repr=False)


class RequestPlanner:
    """Makes requests out of items.

    Args:
        items: that are sent, in order.
        timeout_ms: the deadline in each request; None: the server's.
        seed: of the arrival times.
    """

    def __init__(self, items: ItemSource, *, timeout_ms: int | None, seed: int) -> None:
        self._items = items
        self._options = {} if timeout_ms is None else {"timeout_ms": timeout_ms}
        self._seed = seed

    def request(self, stream: Stream, start_s: float = 0.0) -> PlannedRequest:
        """Return the next request of a stream."""
        items = self._items.take(stream.items_per_request)
        body = json.dumps({"items": items, **self._options}, ensure_ascii=False).encode()
        return PlannedRequest(stream.name, start_s, items, body)

    def schedule(self, phase: Phase, number: int) -> list[PlannedRequest]:
        """Return the requests of all open streams of a phase, by their start; ``number`` is that of the phase."""
        starts = [
            (stream.begin_s + start_s, stream)
            for position, stream in enumerate(phase.streams)
            if isinstance(stream, OpenStream)
            for start_s in stream.arrivals.times(phase.duration_s, (self._seed * 1009 + number) * 1009 + position)
        ]
        starts.sort(key=lambda start: start[0])
        return [self.request(stream, start_s) for start_s, stream in starts]
