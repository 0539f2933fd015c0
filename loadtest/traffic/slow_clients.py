"""Clients that send one byte of a request per second, and so hold connections as long as the server lets them."""

from __future__ import annotations

import asyncio
import contextlib

from loadtest.connection import Address
from loadtest.wire import NATIVE

BODY_BYTES = 10_000
"""Announced by each client, far more than it sends."""
STAGGER = 100
"""Connections that are opened at once, fewer than a listening socket queues."""


async def send_slowly(address: Address, connections: int, seconds: float) -> int:
    """Hold connections for some seconds and return how many the server had not closed by then."""
    tls = address.tls_context()
    opening = asyncio.Semaphore(STAGGER)
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds

    async def hold() -> bool:
        try:
            async with opening:
                reader, writer = await asyncio.open_connection(address.host, address.port, ssl=tls)
        except OSError:
            return False
        with contextlib.closing(writer):
            writer.write(address.post(NATIVE.path, b" " * BODY_BYTES)[:-BODY_BYTES])
            while (left_s := until - loop.time()) > 0:
                await asyncio.sleep(min(1.0, left_s))
                if reader.at_eof() or writer.is_closing() or reader.exception() is not None:
                    return False
                writer.write(b" ")
        return True

    return sum(await asyncio.gather(*(hold() for _ in range(connections))))
