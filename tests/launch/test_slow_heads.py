"""Connections to uvicorn on which no request arrives are closed, and no others."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from service.launch import slow_heads
from service.launch.slow_heads import close_slow_heads

HEAD_S = 0.3
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def answer_slowly(_scope: Scope, _receive: Receive, send: Send) -> None:
    await asyncio.sleep(3 * HEAD_S)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
async def port(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    """The port of a server that takes longer for an answer than it allows for a head."""
    monkeypatch.setattr(slow_heads, "CHECK_S", 0.05)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(answer_slowly, log_config=None, lifespan="off", ws="none"))
    serving = asyncio.create_task(server.serve([listener]))
    closing = asyncio.create_task(close_slow_heads(server.server_state.connections, HEAD_S))
    yield listener.getsockname()[1]
    assert not closing.done()
    closing.cancel()
    server.should_exit = True
    await serving
    listener.close()


@pytest.mark.parametrize("sent", [b"", REQUEST[:-2]], ids=["nothing", "a part"])
@pytest.mark.parametrize("after_a_request", [False, True], ids=["first", "second"])
async def test_a_head_that_does_not_arrive(port: int, sent: bytes, *, after_a_request: bool) -> None:
    """A connection without a complete head is closed; one that is idle after an answer is left to its own timer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    if after_a_request:
        writer.write(REQUEST)
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
    writer.write(sent)
    try:
        is_closed = await asyncio.wait_for(reader.read(1), 4 * HEAD_S) == b""
    except TimeoutError:
        is_closed = False
    writer.close()
    await writer.wait_closed()

    assert is_closed == (bool(sent) or not after_a_request)
