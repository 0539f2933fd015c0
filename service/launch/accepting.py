"""Accepts connections for the local runtime: all that wait, at each turn of the event loop.

uvloop accepts one connection in a turn. A busy loop has few turns a second, so connections would wait for seconds where
nothing measures it and no deadline counts it.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from ssl import SSLContext

MAX_PER_TURN = 256
"""Connections accepted before control returns to the event loop."""
PAUSE_S = 0.5
"""Pause after an error that comes again at once, such as too many open files."""
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class ConnectionAcceptor:
    """Accepts the connections of one listening socket; used on the event loop.

    Args:
        listener: bound and listening; closed by its owner.
        new_protocol: makes the protocol of a connection.
        ssl: for TLS; None: plain TCP.
    """

    def __init__(
        self, listener: socket.socket, new_protocol: Callable[[], asyncio.Protocol], ssl: SSLContext | None
    ) -> None:
        self._listener = listener
        self._new_protocol = new_protocol
        self._ssl = ssl
        self._loop = asyncio.get_running_loop()
        self._connecting: set[asyncio.Task[object]] = set()
        self._pause: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._resume()

    def stop(self) -> None:
        """Accept no more."""
        self._loop.remove_reader(self._listener)
        if self._pause is not None:
            self._pause.cancel()

    def _resume(self) -> None:
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(MAX_PER_TURN):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                self._loop.remove_reader(self._listener)
                self._pause = self._loop.call_later(PAUSE_S, self._resume)
                return
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = self._loop.create_task(self._connect(connection))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _connect(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._new_protocol, connection, ssl=self._ssl)
        except OSError:  # the client has left, or its TLS is not ours
            connection.close()
