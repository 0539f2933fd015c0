"""Cancellation of requests whose client has left, on a server that only reports the disconnect."""

from __future__ import annotations

import asyncio

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from service.http.disconnect import CancelOnDisconnect

SCOPE = {"type": "http", "method": "POST", "path": "/", "headers": []}


class Connection:
    """The two channels of an ASGI connection; the client sends one body and leaves when ``leaves`` is set."""

    def __init__(self) -> None:
        self.leaves = asyncio.Event()
        self.sent: list[Message] = []
        self._messages: list[Message] = [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def receive(self) -> Message:
        if self._messages:
            return self._messages.pop()
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        if message["type"] == "http.response.body":
            self.leaves.set()  # as uvicorn: a disconnect is reported after each complete answer


async def test_a_client_that_leaves_cancels_its_request() -> None:
    """The application is cancelled where it waits, and the cancellation ends there."""
    connection, cancelled = Connection(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, _send: Send) -> None:
        await Request(scope, receive).body()
        connection.leaves.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    await asyncio.create_task(CancelOnDisconnect(app)(dict(SCOPE), connection.receive, connection.send))

    assert cancelled.is_set()


async def test_an_answered_request_is_not_cancelled() -> None:
    """What the application does after its answer, such as its access log line, is not interrupted."""
    connection, finished = Connection(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Request(scope, receive).body()
        await Response(b"{}")(scope, receive, send)
        await asyncio.sleep(0.02)
        finished.set()

    await asyncio.create_task(CancelOnDisconnect(app)(dict(SCOPE), connection.receive, connection.send))

    assert finished.is_set()
    assert connection.sent[0]["status"] == 200


async def test_cancellation_by_the_server_is_passed_on() -> None:
    """A server that cancels the request itself, at the end of a shutdown, sees its task cancelled."""
    connection = Connection()

    async def app(scope: Scope, receive: Receive, _send: Send) -> None:
        await Request(scope, receive).body()
        await asyncio.sleep(60)

    request = asyncio.create_task(CancelOnDisconnect(app)(dict(SCOPE), connection.receive, connection.send))
    await asyncio.sleep(0.02)
    request.cancel()

    with pytest.raises(asyncio.CancelledError):
        await request
