"""A connection of HTTP/1.1 over plain asyncio streams, cheap enough to share the cores with the measured server.

Requests are sent as prepared bytes; of a response the status, the headers and the content are read. Nothing is retried.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from loadtest.wire import UnexpectedAnswer

LONGEST_HEAD = 2**24
"""Bytes that asyncio buffers at once."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    prefix: str = ""
    """Path before the routes, as an application of a Serve configuration may have one."""

    uses_tls: bool = False

    @classmethod
    def of(cls, url: str) -> Address:
        """Return the address in a URL, whose port is 80 or 443 where it has none."""
        parts = urlsplit(url)
        uses_tls = parts.scheme == "https"
        return cls(
            parts.hostname or "127.0.0.1", parts.port or (443 if uses_tls else 80), parts.path.rstrip("/"), uses_tls
        )

    @property
    def url(self) -> str:
        """The address as a URL."""
        return f"{'https' if self.uses_tls else 'http'}://{self.host}:{self.port}{self.prefix}"

    def tls_context(self) -> ssl.SSLContext | None:
        """Return a context that verifies the server's certificate; None where the URL is plain HTTP."""
        return ssl.create_default_context() if self.uses_tls else None

    def post(self, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> bytes:
        """Return the bytes of a request that posts a JSON body."""
        lines = [
            f"POST {self.prefix}{path} HTTP/1.1",
            f"Host: {self.host}:{self.port}",
            "Content-Type: application/json",
            *(f"{name}: {value}" for name, value in (headers or {}).items()),
            f"Content-Length: {len(body)}",
        ]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@dataclass(frozen=True, slots=True)
class Response:
    """What a server returned."""

    status: int

    headers: Mapping[bytes, bytes] = field(repr=False)
    """By lower-case name."""

    content: bytes = field(repr=False)


class Connection:
    """A persistent connection, which is opened when it is first used, and again after either side has closed it.

    A proxy closes connections while another one replaces it, in the first second after a service starts.
    """

    def __init__(self, address: Address, tls: ssl.SSLContext | None = None) -> None:
        self._address = address
        self._tls = tls
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open the connection unless it is open, and return its streams.

        Raises:
            OSError: it is refused.
        """
        reader, writer = self._reader, self._writer
        if reader is None or writer is None or writer.is_closing() or reader.at_eof():
            self.close()
            reader, writer = await asyncio.open_connection(
                self._address.host, self._address.port, limit=LONGEST_HEAD, ssl=self._tls
            )
            self._reader, self._writer = reader, writer
        return reader, writer

    async def send(self, request: bytes) -> Response:
        """Send a request and return the response.

        Raises:
            OSError, EOFError: the connection was refused or broke.
            UnexpectedAnswer: the response has no Content-Length.
        """
        reader, writer = await self.open()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        status_line, *lines = head.split(b"\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        if b"content-length" not in headers:
            raise UnexpectedAnswer("A response has no Content-Length")
        content = await reader.readexactly(int(headers[b"content-length"]))
        if headers.get(b"connection", b"").lower() == b"close":
            self.close()
        return Response(int(status_line.split()[1]), headers, content)

    def close(self) -> None:
        """Close the connection; the next request opens it again."""
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None
