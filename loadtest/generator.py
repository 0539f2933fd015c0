"""Sends prepared requests, over persistent connections or one for each, and measures the latency of the responses.

It shares the cores with the server that it measures, so it does little itself: plain asyncio streams, request bodies
built in advance, responses parsed after the clock has stopped. The loop is closed: each connection sends its next
request after the response to the previous one, so latencies do not show how a server behaves when it is overloaded;
`loadtest.traffic` does.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from loadtest.connection import Address, Connection
from loadtest.wire import NATIVE, UnexpectedAnswer, WireFormat


@dataclass(frozen=True, slots=True)
class Reply:
    """The response to one request."""

    status: int
    content: bytes = field(repr=False)

    latency_s: float
    """From the first byte sent, or from the opening of the request's own connection, to the last byte received."""


@dataclass(frozen=True, slots=True)
class LoadRun:
    """The replies to all requests."""

    replies: tuple[Reply, ...]
    """In the order of the requests."""

    wire: WireFormat

    wall_s: float
    """From the first request to the last response."""

    cpu_s: float
    """CPU seconds of the generator."""

    @property
    def rewards(self) -> list[float]:
        """The rewards of all items, in the order of the requests.

        Raises:
            UnexpectedAnswer: a status is not 200, or an item has no reward.
        """
        for reply in self.replies:
            if reply.status != 200:
                raise UnexpectedAnswer(f"{self.wire.path} returned status {reply.status} instead of rewards")
        return [reward for reply in self.replies for reward in self.wire.rewards(reply.content)]

    def latency_s(self, quantile: float) -> float:
        """Return a quantile of the latencies (nearest rank)."""
        ordered = sorted(reply.latency_s for reply in self.replies)
        return ordered[max(0, math.ceil(quantile * len(ordered)) - 1)]


def send_all(
    url: str, bodies: Sequence[bytes], num_connections: int, wire: WireFormat = NATIVE, *, reuse: bool = True
) -> LoadRun:
    """Post every body to the wire format's path at ``url``, over ``num_connections`` connections at a time.

    Args:
        url: of the server.
        bodies: of the requests.
        num_connections: number of connections that are open at once.
        wire: format of the bodies.
        reuse: whether a connection carries many requests; False: each request has its own, which the client closes
            after the response, as OpenRLHF and verl do.

    Raises:
        OSError, EOFError: a connection was refused or broke.
        UnexpectedAnswer: a response has no Content-Length.
    """
    return asyncio.run(_send_all(url, bodies, num_connections, wire, reuse=reuse))


def send_for(
    url: str, bodies: Sequence[bytes], num_connections: int, seconds: float, wire: WireFormat = NATIVE
) -> LoadRun:
    """Post the bodies one after the other, again from the first after the last, until the time has passed.

    Args:
        url: of the server.
        bodies: of the requests, at least one.
        num_connections: number of connections that are open at once.
        seconds: after which no further request is sent; those that are sent are answered.
        wire: format of the bodies.

    Returns:
        The replies in the order of sending.

    Raises:
        OSError, EOFError: a connection was refused or broke.
        UnexpectedAnswer: a response has no Content-Length.
    """
    return asyncio.run(_send_all(url, bodies, num_connections, wire, reuse=True, seconds=seconds))


async def _send_all(
    url: str,
    bodies: Sequence[bytes],
    num_connections: int,
    wire: WireFormat,
    *,
    reuse: bool,
    seconds: float | None = None,
) -> LoadRun:
    address = Address.of(url)
    tls = address.tls_context()
    requests = [address.post(wire.path, body) for body in bodies]
    num_connections = num_connections if seconds is not None else min(num_connections, len(bodies))
    connections = [Connection(address, tls) for _ in range(num_connections)]
    replies: dict[int, Reply] = {}
    try:
        for connection in connections:
            await connection.open()
        started, cpu_started = time.perf_counter(), time.process_time()
        waiting = iter(enumerate(requests) if seconds is None else enumerate(_until(started + seconds, requests)))
        await asyncio.gather(*(_send_waiting(connection, waiting, replies, reuse) for connection in connections))
        wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    finally:
        for connection in connections:
            connection.close()
    return LoadRun(tuple(replies[number] for number in range(len(replies))), wire, wall_s, cpu_s)


def _until(deadline: float, requests: Sequence[bytes]) -> Iterator[bytes]:
    """Yield the requests, again and again, until a time of ``perf_counter``."""
    for request in itertools.cycle(requests):
        if time.perf_counter() >= deadline:
            return
        yield request


async def _send_waiting(
    connection: Connection,
    waiting: Iterator[tuple[int, bytes]],
    replies: dict[int, Reply],
    reuse: bool,
) -> None:
    if not reuse:
        connection.close()  # opened with the others; each request opens its own
    for number, request in waiting:
        sent = time.perf_counter()
        response = await connection.send(request)
        replies[number] = Reply(response.status, response.content, time.perf_counter() - sent)
        if not reuse:
            connection.close()
