"""Bounds the head of a request to the local runtime, which uvicorn does not; with Ray HAProxy does this."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
"""Of the request line and all headers; HAProxy takes less."""

MAX_HEADERS = 128


class HeadTooLargeError(ValueError):
    """The head of a request is too large; httptools turns it into an error of its own, and uvicorn into 400."""


class BoundedHeadProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which answers 400 and closes the connection once a head is too large."""

    _head_bytes = 0
    """Of the head that is being received; those of a name or value that is not complete are in ``_open_bytes``."""

    _open_bytes = 0
    _is_head_open = False

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived."""
        super().data_received(data)
        # A header reaches the callbacks when it is complete; one that never ends is counted here.
        self._open_bytes = self._open_bytes + len(data) if self._is_head_open else 0
        if self._open_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too large.")

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._head_bytes, self._is_head_open = 0, True

    def on_url(self, url: bytes) -> None:
        """A part of the URL has arrived."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header is complete."""
        self._count(len(name) + len(value))
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            raise HeadTooLargeError

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._is_head_open = False
        super().on_headers_complete()

    def _count(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            raise HeadTooLargeError
