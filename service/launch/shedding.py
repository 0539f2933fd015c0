"""Refuses whole requests of a busy local runtime on the bytes, which costs a third of making a request of them.

Under overload most requests are refused, and what that costs is missing for the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from service.http.facts import as_request_id
from service.http.unread_refusals import Gate
from service.launch.bounded_heads import MAX_HEAD_BYTES, MAX_HEADERS, BoundedHeadProtocol

_LEFT_TO_THE_PARSER = frozenset({b"transfer-encoding", b"connection", b"expect", b"upgrade"})
"""Headers that change how a request is framed or answered."""
_SPACES = (b" ", b"\t")


@dataclass(frozen=True, slots=True)
class WholeRequest:
    """What a refusal needs of a request."""

    path: str
    request_id: bytes | None


class SheddingProtocol(BoundedHeadProtocol):
    """The protocol of a connection.

    Args:
        gate: decides what is refused.
        arguments: of uvicorn's protocol.
    """

    def __init__(self, gate: Gate, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._gate = gate

    def data_received(self, data: bytes) -> None:
        """Answer what has arrived, if it is one request that is to be refused, else parse it."""
        refusals = self._gate.refusals
        if refusals is None or not data.startswith(b"POST ") or not self._is_between_requests():
            super().data_received(data)
            return
        refusal = refusals.refusal()
        request = None if refusal is None else read_whole_request(data)
        if refusal is None or request is None:
            super().data_received(data)
            return
        headers, content = refusals.response(refusal, as_request_id(request.request_id))
        lines = [b"%b: %b" % header for header in (*self.server_state.default_headers, *headers)]
        self.transport.write(b"\r\n".join([b"HTTP/1.1 503 Service Unavailable", *lines, b"", content]))
        refusals.count(request.path)
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _is_between_requests(self) -> bool:
        """Whether all that has arrived is answered, and the client reads its answers."""
        cycle: RequestResponseCycle | None = self.cycle
        is_answered = cycle is None or (cycle.response_complete and not cycle.more_body)
        return is_answered and not (
            self._is_head_open or self.pipeline or self.flow.write_paused or self.transport.is_closing()
        )


def read_whole_request(data: bytes) -> WholeRequest | None:
    """Read a POST request that is complete and plain; None: the parser is to decide."""
    head, separator, body = data.partition(b"\r\n\r\n")
    request_line, *lines = head.split(b"\r\n")
    parts = request_line.split(b" ")
    if not separator or len(head) > MAX_HEAD_BYTES or len(lines) > MAX_HEADERS or len(parts) != 3:
        return None
    if parts[0] != b"POST" or parts[2] != b"HTTP/1.1" or not parts[1].startswith(b"/"):
        return None
    request_id, length = None, None
    for line in lines:
        name, colon, value = line.partition(b":")
        name = name.lower()
        if not colon or not name or name.endswith(_SPACES) or name.startswith(_SPACES) or name in _LEFT_TO_THE_PARSER:
            return None
        if name == b"content-length":
            if length is not None:
                return None
            length = value.strip(b" \t")
        elif name == b"x-request-id" and request_id is None:
            request_id = value.strip(b" \t")
    if length != b"%d" % len(body):
        return None
    return WholeRequest(parts[1].partition(b"?")[0].rstrip(b"/").decode("latin-1"), request_id)
