"""Bytes over a socket, and the HTTP answers that come back, without a client that would correct them."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

PROBLEM_CODES_OF_5XX = frozenset(
    {
        "overloaded",
        "not_ready",
        "draining",
        "engine_unavailable",
        "deadline_exceeded",
        "engine_failed",
        "non_finite_reward",
    }
)
"""Codes of problems with a status of 5xx that the service means; any other 5xx is a fault of its."""


@dataclass(frozen=True)
class RawAnswer:
    """One HTTP answer. ``status`` is 0 where the server closed the connection without one."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def is_fault(self) -> bool:
        """Whether it is a 5xx that the service does not mean."""
        if self.status < 500:
            return False
        try:
            return json.loads(self.body).get("code") not in PROBLEM_CODES_OF_5XX
        except (ValueError, AttributeError):
            return True


class RawConnection:
    """A connection to a server; ``ask`` opens it anew where the server has closed it.

    Args:
        url: of the server.
        timeout_s: after which an answer counts as missing; TimeoutError is raised then.
    """

    def __init__(self, url: str, timeout_s: float = 5.0) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "", parts.port or 80)
        self._timeout_s = timeout_s
        self._socket: socket.socket | None = None
        self._buffer = b""

    def ask(self, request: bytes, *, is_head: bool = False) -> RawAnswer:
        """Send one request, and return its answer."""
        try:
            return self._exchange(request, is_head=is_head)
        except (ConnectionError, BrokenPipeError):
            self.close()
        return self._exchange(request, is_head=is_head)

    def send(self, data: bytes, *, ends: bool = False) -> list[RawAnswer]:
        """Send bytes on a new connection, and return all answers until the server closes it or is silent.

        Args:
            data: any bytes.
            ends: whether the client closes its side afterwards.
        """
        self.close()
        self._open()
        assert self._socket is not None
        with contextlib.suppress(OSError):  # the server has closed the connection already
            self._socket.sendall(data)
            if ends:
                self._socket.shutdown(socket.SHUT_WR)
        answers = []
        with contextlib.suppress(ConnectionError, TimeoutError):
            while (answer := self._read_answer(is_head=False)).status:
                answers.append(answer)
        self.close()
        return answers

    def close(self) -> None:
        """Close the connection, if it is open."""
        if self._socket is not None:
            self._socket.close()
        self._socket, self._buffer = None, b""

    def _open(self) -> None:
        if self._socket is None:
            self._socket = socket.create_connection(self._address, self._timeout_s)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _exchange(self, request: bytes, *, is_head: bool) -> RawAnswer:
        self._open()
        assert self._socket is not None
        self._socket.sendall(request)
        answer = self._read_answer(is_head=is_head)
        while answer.status == 100:
            answer = self._read_answer(is_head=is_head)
        if not answer.status or answer.headers.get("connection", "").lower() == "close":
            self.close()
        return answer

    def _read_answer(self, *, is_head: bool) -> RawAnswer:
        head = self._until(b"\r\n\r\n")
        if head is None:
            return RawAnswer(0)
        first, *lines = head.decode("latin-1").split("\r\n")
        status = int(first.split(" ")[1])
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if is_head or status in {100, 204, 304}:
            return RawAnswer(status, headers)
        if "content-length" in headers:
            return RawAnswer(status, headers, self._exactly(int(headers["content-length"])))
        if headers.get("transfer-encoding") == "chunked":
            return RawAnswer(status, headers, b"".join(self._chunks()))
        return RawAnswer(status, headers, self._rest())

    def _chunks(self) -> Iterator[bytes]:
        while size := int((self._until(b"\r\n") or b"0").split(b";")[0], 16):
            yield self._exactly(size)
            self._exactly(2)
        self._until(b"\r\n")

    def _until(self, mark: bytes) -> bytes | None:
        while mark not in self._buffer:
            if not self._receive():
                return None
        found, _, self._buffer = self._buffer.partition(mark)
        return found

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size and self._receive():
            pass
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    def _rest(self) -> bytes:
        while self._receive():
            pass
        taken, self._buffer = self._buffer, b""
        return taken

    def _receive(self) -> bool:
        assert self._socket is not None
        data = self._socket.recv(65536)
        self._buffer += data
        return bool(data)
