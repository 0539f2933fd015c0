"""Sends prepared requests over kept-alive connections and says what came back, how fast.

It shares the cores with the server that it measures, so it is light: plain asyncio streams, bytes made beforehand,
answers read only after the clock has stopped. Closed loop: each connection sends its next request when it has the
answer to the last, so latencies say nothing about a server that is offered more than it can do.
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
    """One answer. ``latency_s``: from the first byte sent to the last byte read."""

    status: int
    content: bytes = field(repr=False)
    latency_s: float


@dataclass(frozen=True, slots=True)
class LoadRun:
    """All replies in the order of the requests; ``wall_s`` from first send to last answer, ``cpu_s`` spent by us."""

    replies: tuple[Reply, ...]
    wire: WireFormat
    wall_s: float
    cpu_s: float

    @property
    def rewards(self) -> list[float]:
        """The rewards of all items, in the order sent.

        Raises:
            UnexpectedAnswer: an answer is not a 200, or an item has no reward.
        """
        for reply in self.replies:
            if reply.status != 200:
                raise UnexpectedAnswer(f"{self.wire.path} answered {reply.status} where rewards were asked for")
        return [reward for reply in self.replies for reward in self.wire.rewards(reply.content)]

    def latency_s(self, quantile: float) -> float:
        """Latency that this share of the requests stayed within (nearest rank)."""
        ordered = sorted(reply.latency_s for reply in self.replies)
        return ordered[max(0, math.ceil(quantile * len(ordered)) - 1)]


def send_all(url: str, bodies: Sequence[bytes], num_connections: int, wire: WireFormat = NATIVE) -> LoadRun:
    """Post every body to the wire format's path at ``url``, over so many connections at a time.

    Raises:
        OSError, EOFError: a connection broke.
        UnexpectedAnswer: an answer without a Content-Length.
    """
    return asyncio.run(_send_all(url, bodies, num_connections, wire))


async def _send_all(url: str, bodies: Sequence[bytes], num_connections: int, wire: WireFormat) -> LoadRun:
    place = urlsplit(url)
    host, port = place.hostname or "127.0.0.1", place.port or 80
    head = f"POST {wire.path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    requests = [f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies]
    connections = [await _Connection.opened(host, port) for _ in range(min(num_connections, len(bodies)))]
    replies: dict[int, Reply] = {}
    waiting = iter(enumerate(requests))
    started, cpu_started = time.perf_counter(), time.process_time()
    try:
        await asyncio.gather(*(_converse(connection, waiting, replies) for connection in connections))
        wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    finally:
        for connection in connections:
            connection.close()
    return LoadRun(tuple(replies[number] for number in range(len(requests))), wire, wall_s, cpu_s)


class _Connection:
    """A kept-alive connection, opened anew where the server has said that it closes it.

    A proxy that makes room for its successor says so, as happens in the first second of a service's life.
    """

    def __init__(self, host: str, port: int) -> None:
        self._place = (host, port)
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    @classmethod
    async def opened(cls, host: str, port: int) -> _Connection:
        connection = cls(host, port)
        await connection._open()
        return connection

    async def _open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(*self._place, limit=2**24)

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Return status and content of the answer."""
        if self._writer.is_closing():
            await self._open()
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        status_line, *lines = head.split(b"\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        if b"content-length" not in headers:
            raise UnexpectedAnswer("An answer came without a Content-Length")
        content = await self._reader.readexactly(int(headers[b"content-length"]))
        if headers.get(b"connection", b"").lower() == b"close":
            self.close()
        return int(status_line.split()[1]), content

    def close(self) -> None:
        self._writer.close()


async def _converse(connection: _Connection, waiting: Iterator[tuple[int, bytes]], replies: dict[int, Reply]) -> None:
    for number, request in waiting:
        sent = time.perf_counter()
        status, content = await connection.ask(request)
        replies[number] = Reply(status, content, time.perf_counter() - sent)
