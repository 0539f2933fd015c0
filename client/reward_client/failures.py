"""Why an attempt failed, in words: what an exception of the connection or an unexpected response means."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

import httpx2


def connection_failure(error: httpx2.TransportError, attempt_s: float) -> str:
    """Return the reason of a failed connection, from the exception behind it where that says more.

    Args:
        error: of the attempt.
        attempt_s: seconds without a byte after which it was given up.
    """
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, socket.gaierror):
            return "the name of the host does not resolve"
        if isinstance(cause, ConnectionRefusedError):
            return "connection refused"
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"the certificate is not accepted: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError):
            return f"TLS failed ({cause.reason}): the service may speak http:// only"
    if isinstance(error, httpx2.ConnectTimeout):
        return "no connection in time"
    if isinstance(error, httpx2.TimeoutException):
        return f"no byte for {attempt_s:.3g} s" if isinstance(error, httpx2.ReadTimeout) else type(error).__name__
    if isinstance(error, httpx2.ProxyError):
        return f"the proxy refused: {error}"
    if isinstance(error, httpx2.RemoteProtocolError):
        return "the connection was closed before the response was complete"
    for cause in causes:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower()
    return f"the connection broke ({type(error).__name__})"


def never_connected(error: httpx2.TransportError) -> bool:
    """Whether no connection was made: the request cannot have been received."""
    return isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and those behind it, also the several of an attempt at several addresses."""
    while error is not None:
        yield error
        if isinstance(error, BaseExceptionGroup):
            for member in error.exceptions:
                yield from _causes(member)
        error = error.__cause__ or error.__context__
