"""Sends prepared requests, over persistent connections or one for each, and measures the latency of the responses.

It shares the cores with the server that it measures, so it does little itself: plain asyncio streams, request bodies
built in advance, responses parsed after the clock has stopped. The loop is closed: each connection sends its next
request after the response to the previous one, so latencies do not show how a server behaves when it is overloaded.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

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


async def _send_all(
    url: str, bodies: Sequence[bytes], num_connections: int, wire: WireFormat, *, reuse: bool
) -> LoadRun:
    address = urlsplit(url)
    host, port = address.hostname or "127.0.0.1", address.port or 80
    head = f"POST {wire.path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    requests = [f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies]
    connections = [await _Connection.opened(host, port) for _ in range(min(num_connections, len(bodies)))]
    replies: dict[int, Reply] = {}
    waiting = iter(enumerate(requests))
    started, cpu_started = time.perf_counter(), time.process_time()
    try:
        await asyncio.gather(*(_send_waiting(connection, waiting, replies, reuse) for connection in connections))
        wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    finally:
        for connection in connections:
            connection.close()
    return LoadRun(tuple(replies[number] for number in range(len(requests))), wire, wall_s, cpu_s)


class _Connection:
    """A persistent connection, which is opened again after the server has announced that it closes it.

    A proxy does so while another one replaces it, in the first second after a service starts.
    """

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    @classmethod
    async def opened(cls, host: str, port: int) -> _Connection:
        connection = cls(host, port)
        await connection._open()
        return connection

    async def _open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(*self._address, limit=2**24)

    async def send(self, request: bytes) -> tuple[int, bytes]:
        """Send a request and return status and content of the response."""
        if self._writer.is_closing():
            await self._open()
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        status_line, *lines = head.split(b"\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        if b"content-length" not in headers:
            raise UnexpectedAnswer("A response has no Content-Length")
        content = await self._reader.readexactly(int(headers[b"content-length"]))
        if headers.get(b"connection", b"").lower() == b"close":
            self.close()
        return int(status_line.split()[1]), content

    def close(self) -> None:
        self._writer.close()


async def _send_waiting(
    connection: _Connection,
    waiting: Iterator[tuple[int, bytes]],
    replies: dict[int, Reply],
    reuse: bool,
) -> None:
    if not reuse:
        connection.close()  # opened with the others; each request opens its own
    for number, request in waiting:
        sent = time.perf_counter()
        status, content = await connection.send(request)
        replies[number] = Reply(status, content, time.perf_counter() - sent)
        if not reuse:
            connection.close()
