"""Clients that send one byte of a request per second, in a process of their own.

In the process that measures they would delay the measured requests. The process has the lowest priority, so that it
delays nobody by its own work either. A connection that the server closes is replaced by a new one.

    python -m loadtest.traffic.slow_clients URL CONNECTIONS

prints a line once all connections are open, holds them until its standard input ends, and prints another line; both
are JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass

from loadtest.connection import Address
from loadtest.wire import NATIVE

BODY_BYTES = 10_000
"""Announced by each client, far more than it sends."""
STAGGER = 100
"""Connections that are opened at once, fewer than a listening socket queues."""
LOWEST_PRIORITY = 19
PAUSE_S = 1.0
"""Between two bytes, and before a refused connection is tried again."""
OPEN_WITHIN_S = 60.0


@dataclass(slots=True)
class HeldConnections:
    """What became of the connections."""

    open: int = 0
    """Connections that are open at present, or were at the end."""

    closed_by_server: int = 0
    refused: int = 0


@contextlib.asynccontextmanager
async def slow_clients(address: Address, connections: int) -> AsyncIterator[HeldConnections]:
    """Hold connections while the block runs, which begins when all are open.

    Yields:
        The connections that are open at the begin; the block's end updates it.

    Raises:
        OSError: not all of them could be opened.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        __name__,
        address.url,
        str(connections),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    if process.stdin is None or process.stdout is None:
        raise AssertionError("both are pipes")
    held = HeldConnections()
    try:
        async with asyncio.timeout(OPEN_WITHIN_S):
            _update(held, await process.stdout.readline())
        if held.open < connections:
            raise OSError(f"only {held.open} of {connections} slow connections could be opened")
        yield held
        process.stdin.close()
        _update(held, await process.stdout.readline())
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _update(held: HeldConnections, line: bytes) -> None:
    for name, value in json.loads(line or b"{}").items():
        setattr(held, name, value)


class _Clients:
    """The clients of this process."""

    def __init__(self, address: Address) -> None:
        self.held = HeldConnections()
        self._address = address
        self._tls = address.tls_context()
        self._opening = asyncio.Semaphore(STAGGER)

    async def hold(self, tried: asyncio.Event) -> None:
        """Hold one connection for ever, and note when the first one was tried."""
        while True:
            try:
                async with self._opening:
                    reader, writer = await asyncio.open_connection(
                        self._address.host, self._address.port, ssl=self._tls
                    )
            except OSError:
                self.held.refused += 1
                tried.set()
                await asyncio.sleep(PAUSE_S)
                continue
            self.held.open += 1
            tried.set()
            with contextlib.closing(writer):
                await self._send_slowly(reader, writer)
            self.held.open -= 1
            self.held.closed_by_server += 1

    async def _send_slowly(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Send bytes until the server closes the connection."""
        writer.write(self._address.post(NATIVE.path, b" " * BODY_BYTES)[:-BODY_BYTES])
        # Clients that know nothing of each other do not send in the same moment of each second.
        await asyncio.sleep(PAUSE_S * random.random())  # noqa: S311 - a time, not a secret
        while not (reader.at_eof() or writer.is_closing() or reader.exception() is not None):
            await asyncio.sleep(PAUSE_S)
            writer.write(b" ")


async def _hold(url: str, connections: int) -> None:
    clients = _Clients(Address.of(url))
    tried = [asyncio.Event() for _ in range(connections)]
    tasks = [asyncio.create_task(clients.hold(event)) for event in tried]
    for event in tried:
        await event.wait()
    _print(clients.held)
    await asyncio.to_thread(sys.stdin.buffer.read)
    _print(clients.held)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _print(held: HeldConnections) -> None:
    print(json.dumps(asdict(held)), flush=True)


if __name__ == "__main__":
    os.nice(LOWEST_PRIORITY)
    asyncio.run(_hold(sys.argv[1], int(sys.argv[2])))
