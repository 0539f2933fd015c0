"""The HTTP server of the local runtime under overload: what it refuses on the bytes, and how it accepts connections."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
import uvloop
from http_application import application

from service.errors import Overloaded
from service.http import unread_refusals
from service.http.unread_refusals import Gate, UnreadRefusals
from service.launch.accepting import ConnectionAcceptor
from service.launch.local import _HttpServer
from service.launch.shedding import WholeRequest, read_whole_request

HEAD = b"POST /v1/score?a=b HTTP/1.1\r\nHost: x\r\n"
BODY = json.dumps({"items": [{"text": "a"}]}).encode()


def request_of(*lines: bytes, head: bytes = HEAD, body: bytes = b"body", length: bytes = b"4") -> bytes:
    return b"\r\n".join([head + b"Content-Length: " + length, *lines, b"", body])


@pytest.mark.parametrize(
    ("data", "request_id"),
    [(request_of(), None), (request_of(b"X-REQUEST-ID:  mine "), b"mine"), (request_of(body=b"", length=b"0"), None)],
)
def test_a_whole_request_is_read(data: bytes, request_id: bytes | None) -> None:
    """Path and id of a complete and plain request are found."""
    assert read_whole_request(data) == WholeRequest("/v1/score", request_id)


@pytest.mark.parametrize(
    "data",
    [
        request_of(length=b"5"),
        request_of(length=b"3"),
        request_of(length=b"+4"),
        request_of(length=b"4, 4"),
        request_of(b"Content-Length: 4"),
        request_of(b"Transfer-Encoding: chunked"),
        request_of(b"transfer-encoding : chunked"),
        request_of(b" folded: line"),
        request_of(b"no colon"),
        request_of(b"Connection: close"),
        request_of(b"Expect: 100-continue"),
        request_of(head=HEAD.replace(b"1.1", b"1.0")),
        request_of(head=HEAD.replace(b"POST", b"GET")),
        request_of(head=HEAD.replace(b"/v1", b"http://x/v1")),
        request_of(*[b"a: b"] * 200),
        HEAD,
        HEAD + b"\r\n",
        b"",
    ],
)
def test_what_is_not_plain_is_left_to_the_parser(data: bytes) -> None:
    """A request that is not complete, framed in another way, or not valid is never answered on the bytes."""
    assert read_whole_request(data) is None


@asynccontextmanager
async def served(app: Any, gate: Gate) -> AsyncIterator[int]:
    """Run the HTTP server of the local runtime; yield its port."""
    config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None, access_log=False, timeout_keep_alive=5)
    server = _HttpServer(config, gate)
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    port: int = listener.getsockname()[1]
    running = asyncio.create_task(server.serve([listener]))
    try:
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        yield port
    finally:
        server.should_exit = True
        await running


async def test_requests_are_refused_on_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused request gets the problem that the application would send, on a connection that stays open."""
    monkeypatch.setattr(unread_refusals, "COUNT_S", 0.1)
    gate = Gate()
    async with application(tmp_path) as app:
        asgi: Any = app.client._transport.app  # type: ignore[attr-defined]
        gate.refusals = asgi.state.unread_refusals
        async with served(asgi, gate) as port, httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            headers = {"Content-Type": "application/json", "X-Request-Id": "mine"}
            assert (await client.post("/v1/score", content=BODY, headers=headers)).status_code == 200
            monkeypatch.setattr(UnreadRefusals, "refusal", lambda _: Overloaded("Too many.", 3.0))
            on_bytes, by_application = await refusals_of(port), await refusals_of(port, b"Connection: keep-alive")
            assert by_application == on_bytes
            assert on_bytes[0] == b"HTTP/1.1 503 Service Unavailable"
            assert (await client.get("/readyz")).status_code == 200
            monkeypatch.setattr(UnreadRefusals, "refusal", lambda _: None)
            assert (await client.post("/v1/score", content=BODY, headers=headers)).status_code == 200
        await asyncio.sleep(0.2)
        assert 'rm_requests_total{code="overloaded",route="/v1/score"} 4.0' in app.served.metrics.render().decode()


async def refusals_of(port: int, *lines: bytes) -> list[bytes]:
    """Send two requests on one connection; return the lines of the second answer but the date, and its code."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(2):
        writer.write(request_of(b"X-Request-Id: mine", *lines))
        head = await reader.readuntil(b"\r\n\r\n")
        lower = {line.partition(b":")[0].lower(): line.partition(b":")[2].strip() for line in head.split(b"\r\n")[1:]}
        problem = json.loads(await reader.readexactly(int(lower[b"content-length"])))
    writer.close()
    assert (problem["code"], problem["instance"]) == ("overloaded", "urn:request:mine")
    assert 3 <= int(lower.pop(b"retry-after")) <= 4
    lower.pop(b"date", None)
    return [head.split(b"\r\n")[0], *sorted(b"%b: %b" % header for header in lower.items())]


def test_all_connections_that_wait_are_accepted_in_a_turn() -> None:
    """A loop that was blocked accepts everything at its next turns, also where its own server would take one each."""

    async def accept() -> tuple[int, int]:
        loop = asyncio.get_running_loop()
        made: list[float] = []

        class Counting(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                made.append(time.monotonic())

        with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
            acceptor = ConnectionAcceptor(listener, Counting, None)
            clients = [socket.create_connection(listener.getsockname()) for _ in range(200)]
            num_turns = 0
            give_up_at = loop.time() + 10
            while len(made) < len(clients) and loop.time() < give_up_at:
                num_turns += 1
                await asyncio.sleep(0)
            acceptor.stop()
            for client in clients:
                client.close()
        return len(made), num_turns

    num_made, num_turns = uvloop.run(accept())
    assert num_made == 200
    assert num_turns < 50
