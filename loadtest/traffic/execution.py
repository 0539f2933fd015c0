"""Runs phases: sends each request at its time, waits for all answers, and records what happened.

Latencies count from the intended start of a request. Where the server, the network or this process is late, so is the
answer: nothing is omitted because an earlier request was slow (coordinated omission).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from loadtest.connection import Address, Connection, Response
from loadtest.traffic.phases import BurstStream, ClosedStream, Phase, PlannedRequest, RequestPlanner
from loadtest.wire import NATIVE, UnexpectedAnswer

NO_ANSWER = 0
"""The status of a request that got no answer."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request and its answer; times are seconds from the begin of the phase."""

    request: PlannedRequest = field(repr=False)
    intended_s: float
    sent_s: float
    done_s: float
    status: int
    content: bytes = field(repr=False, default=b"")
    has_retry_after: bool = False

    failure: str = ""
    """Name of the exception, where there is no answer."""

    @property
    def latency_s(self) -> float:
        """From the intended start to the last byte."""
        return self.done_s - self.intended_s

    @property
    def service_s(self) -> float:
        """From the first byte sent to the last byte."""
        return self.done_s - self.sent_s

    @property
    def num_items(self) -> int:
        """Items of the request."""
        return len(self.request.items)


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of a burst stream."""

    stream: str
    start_s: float
    completion_s: float
    """From the start to the last answer."""
    train_s: float


@dataclass(slots=True)
class PhaseRun:
    """What happened in a phase."""

    phase: Phase
    exchanges: list[Exchange] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    wall_s: float = 0.0
    """Until the last answer."""
    cpu_s: float = 0.0
    """CPU seconds of this process."""


@dataclass(slots=True)
class Tally:
    """Counts for the display of progress."""

    phase: str = ""
    sent: int = 0
    by_status: dict[int, int] = field(default_factory=dict)

    @property
    def open(self) -> int:
        """Requests without an answer so far."""
        return self.sent - sum(self.by_status.values())


class Executor:
    """Sends requests to one server.

    Args:
        address: of the server.
        headers: further headers of each request.
        give_up_s: seconds after the intended start at which a request is abandoned.
        max_connections: at once; a request that finds all in use waits, and its latency counts on.
        reuse: whether a connection carries many requests; False: each request has its own.
    """

    def __init__(
        self,
        address: Address,
        *,
        headers: Mapping[str, str] | None = None,
        give_up_s: float = 60.0,
        max_connections: int = 2048,
        reuse: bool = True,
    ) -> None:
        self.tally = Tally()
        self._address = address
        self._tls = address.tls_context()
        self._headers = dict(headers or {})
        self._give_up_s = give_up_s
        self._free = asyncio.Semaphore(max_connections)
        self._idle: list[Connection] = []
        self._reuse = reuse
        self._began = 0.0

    async def run(self, phase: Phase, schedule: Sequence[PlannedRequest], planner: RequestPlanner) -> PhaseRun:
        """Run a phase until all its requests are answered or abandoned.

        Args:
            phase: to run.
            schedule: of its open streams.
            planner: of the requests of its other streams, whose number depends on the answers.
        """
        run = PhaseRun(phase)
        self.tally.phase = phase.name
        cpu_started = time.process_time()
        self._began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._send_schedule(schedule, run, group))
            for stream in phase.streams:
                if isinstance(stream, ClosedStream):
                    for _ in range(stream.clients):
                        group.create_task(self._send_closed(stream, planner, run))
                elif isinstance(stream, BurstStream):
                    group.create_task(self._send_batches(stream, planner, run))
        run.wall_s, run.cpu_s = self._now(), time.process_time() - cpu_started
        return run

    def close(self) -> None:
        """Close the connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _send_schedule(self, schedule: Sequence[PlannedRequest], run: PhaseRun, group: asyncio.TaskGroup) -> None:
        for request in schedule:
            if (wait_s := request.start_s - self._now()) > 0:
                await asyncio.sleep(wait_s)
            group.create_task(self._exchange(request, request.start_s, run))

    async def _send_closed(self, stream: ClosedStream, planner: RequestPlanner, run: PhaseRun) -> None:
        while (now := self._now()) < run.phase.duration_s:
            exchange = await self._exchange(planner.request(stream), now, run)
            if exchange.status != 200:
                await asyncio.sleep(0.05)  # a client that repeats a refused request at once would only add refusals

    async def _send_batches(self, stream: BurstStream, planner: RequestPlanner, run: PhaseRun) -> None:
        is_first = True
        while is_first or self._now() < run.phase.duration_s:
            is_first = False
            requests = [planner.request(stream) for _ in range(stream.requests_per_batch)]
            began = self._now()  # the texts of the batch are the trainer's work
            await asyncio.gather(*(self._exchange(request, began, run) for request in requests))
            run.batches.append(Batch(stream.name, began, self._now() - began, stream.train_s))
            await asyncio.sleep(stream.train_s)

    async def _exchange(self, request: PlannedRequest, intended_s: float, run: PhaseRun) -> Exchange:
        """Send a request, record the exchange and return it; failures are recorded too."""
        self.tally.sent += 1
        sent_s = intended_s
        message = self._address.post(NATIVE.path, request.body, self._headers)
        try:
            async with asyncio.timeout(self._give_up_s - (self._now() - intended_s)), self._connection() as connection:
                sent_s = self._now()
                response = await connection.send(message)
            exchange = _answered(request, intended_s, sent_s, self._now(), response)
        except (OSError, EOFError, UnexpectedAnswer) as error:  # TimeoutError is an OSError
            exchange = Exchange(request, intended_s, sent_s, self._now(), NO_ANSWER, failure=type(error).__name__)
        self.tally.by_status[exchange.status] = self.tally.by_status.get(exchange.status, 0) + 1
        run.exchanges.append(exchange)
        return exchange

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        """Yield a connection that nobody else uses; it is closed after a failure."""
        async with self._free:
            connection = self._idle.pop() if self._idle else Connection(self._address, self._tls)
            try:
                yield connection
            except BaseException:
                connection.close()
                raise
            if self._reuse:
                self._idle.append(connection)
            else:
                connection.close()

    def _now(self) -> float:
        return time.perf_counter() - self._began


def _answered(request: PlannedRequest, intended_s: float, sent_s: float, done_s: float, response: Response) -> Exchange:
    return Exchange(
        request,
        intended_s,
        sent_s,
        done_s,
        response.status,
        response.content,
        has_retry_after=b"retry-after" in response.headers,
    )
