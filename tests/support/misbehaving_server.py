"""A real HTTP server on the loopback interface, whose responses a test defines byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

VERSION = "v1"


@dataclass(frozen=True)
class Request:
    """A request that the server received; ``number`` counts its requests from 0."""

    number: int
    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class FakeServer:
    """A service without faults: the reward of an item is the number that its completion contains."""

    requests: list[Request] = field(default_factory=list)
    in_flight: int = 0
    max_in_flight: int = 0
    url: str = ""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield ok(scores(request))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection until either side closes it; an empty answer closes it."""
        ended = contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with ended, contextlib.closing(writer):
            while request := await self._read(reader):
                self.requests.append(request)
                self.in_flight += 1
                self.max_in_flight = max(self.max_in_flight, self.in_flight)
                sent = b""
                try:
                    async for part in self.answer(request):
                        sent += part
                        writer.write(part)
                        await writer.drain()
                finally:
                    self.in_flight -= 1
                if not sent or b"Connection: close" in sent:
                    break

    async def _read(self, reader: asyncio.StreamReader) -> Request | None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split()
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        return Request(len(self.requests), method, path, headers, json.loads(content) if content else None)


class CountingServer(FakeServer):
    """Counts its connections."""

    connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        await super().serve(reader, writer)


AnyServer = TypeVar("AnyServer", bound=FakeServer)


@contextlib.contextmanager
def running(server: AnyServer) -> Iterator[AnyServer]:
    """Run the server on a free port of 127.0.0.1, in a thread with its own event loop."""
    started = threading.Event()
    stop: list[Callable[[], object]] = []

    async def serve() -> None:
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(ended.set))
        listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        started.set()
        await ended.wait()
        listener.close()
        await close_connections()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    if not started.wait(10):
        raise TimeoutError("The server of the test did not start")
    try:
        yield server
    finally:
        stop[0]()
        thread.join(10)


async def close_connections() -> None:
    """Close all connections of the running loop, and wait until their transports are closed."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.sleep(0.01)


def response(status: str, content: bytes, *headers: str, length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(content) if length is None else length}", *headers, "", ""]
    return "\r\n".join(lines).encode() + content


def ok(answer: object) -> bytes:
    return response("200 OK", json.dumps(answer).encode(), "Content-Type: application/json")


def problem(status: str, code: str, *headers: str) -> bytes:
    content = json.dumps({"code": code, "detail": "a detail"}).encode()
    return response(status, content, "Content-Type: application/problem+json", *headers)


def scores(request: Request, version: str = VERSION) -> dict[str, Any]:
    """The answer of ``/v1/score`` without faults."""
    results = [
        {"index": index, "reward": float(item["completion"])} | ({"id": item["id"]} if "id" in item else {})
        for index, item in enumerate(request.body["items"])
    ]
    return {"model": {"name": "tiny", "version": version}, "results": results}
