"""What is changed in the configuration that Ray writes for HAProxy. Pure: text in, text out.

Ray offers no setting for any of this. Its configuration answers 404 until it knows the routes and a plain 500 where no
replica runs, which ends training jobs; it waits for the head of a request as long as bytes come; one caller can take
all connections; and it opens ports that are for operators on all interfaces.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from service.errors import EngineUnavailable, HttpError, NotReady, ServerStartError
from service.protocols.problem import MEDIA_TYPE, render_problem

HEAD_S = 10
"""Seconds in which the request line and the headers have to arrive."""
CHECK_S = 2
"""Seconds in which a replica has to answer a health check. By default it is the time between two, and a replica that is
busy for some seconds would count as dead."""
OTHERS_SHARE = 8
"""One address gets all connections but one in so many, which are left for probes and other clients."""
OFTEN_UNREAD = (401, 408, 413, 415)
"""Statuses of answers after which the connection is closed: the replica may not have read the whole body."""
MARK = "# Changed by the reward service.\n"

ERRORS: dict[int, tuple[HttpError, int]] = {
    502: (EngineUnavailable("The replica ended before it answered."), 1),
    503: (NotReady("No replica answers at the moment."), 2),
    504: (EngineUnavailable("The replica did not answer."), 1),
}
"""By the status that HAProxy gives a failure of its own: what is sent, always as a 503, and its Retry-After in seconds.

Nothing is known here of how long it will take. Answers to malformed and slow heads cannot be changed.
"""


def error_page(status: int) -> bytes:
    """Return the whole HTTP response for a status of `ERRORS`."""
    error, retry_after_s = ERRORS[status]
    content = render_problem(error, "proxy")
    head = (
        "HTTP/1.1 503 Service Unavailable",
        f"Content-Type: {MEDIA_TYPE}",
        f"Content-Length: {len(content)}",
        f"Retry-After: {retry_after_s}",
    )
    return "\r\n".join([*head, "", ""]).encode() + content


def changed(config: str, error_pages: Mapping[int, Path]) -> str:
    """Return Ray's configuration with our changes; one that has them already is returned as it is.

    Args:
        config: as Ray writes it.
        error_pages: the file with the response for each status of `ERRORS`.

    Raises:
        ServerStartError: a line that has to be changed is not there: another version of Ray.
    """
    if config.startswith(MARK):
        return config
    config = _with_error_pages(config, error_pages)
    config = _with_bounded_clients(config)
    for port in (r"(?m)^(frontend prometheus\n\s+bind )(?=:\d)", r"(?m)^(listen stats\n\s+bind )\*(?=:\d)"):
        config = _replaced(port, r"\g<1>127.0.0.1", config)
    config = _replaced(r"(?m)^(\s+stats socket \S+ mode )666\b", r"\g<1>600", config)
    return MARK + _without_fallback(config)


def _with_error_pages(config: str, error_pages: Mapping[int, Path]) -> str:
    lines = "".join(f"    errorfile {status} {path}\n" for status, path in error_pages.items())
    config = _replaced(r"(?m)(^\s+errorfile \d+ \S+\n)+", lines, config)
    if re.search(r"(?m)^\s+use_backend ", config):
        return config
    # HAProxy has just started, and Ray has not told it yet which applications there are.
    return _replaced(
        r"(?m)^(backend default_backend\n\s+http-request )return status 404 .*$", r"\g<1>deny deny_status 503", config
    )


def _with_bounded_clients(config: str) -> str:
    """Bound the time for a head and for the answer to a health check, and the connections of one address.

    A connection whose request was refused before its body was read is not used again.
    """
    times = f"    timeout http-request {HEAD_S}s\n    timeout check {CHECK_S}s\n"
    config = _replaced(r"(?m)^(defaults\n\s+mode http\n)", rf"\g<1>{times}", config)
    limit = re.search(r"(?m)^\s+maxconn (\d+)$", config)
    if limit is None:
        raise _not_found("maxconn")
    max_connections = int(limit[1])
    # These may be answered before the body has been read; a next request would be read as its rest.
    unread = " ".join(map(str, OFTEN_UNREAD))
    rules = (
        f"    http-after-response set-header Connection close if {{ status {unread} }}\n"
        "    stick-table type ipv6 size 100k expire 60s store conn_cur\n"
        "    tcp-request connection track-sc0 src\n"
        "    tcp-request connection reject if "
        f"{{ sc0_conn_cur gt {max_connections - max_connections // OTHERS_SHARE} }}\n"
    )
    return _replaced(r"(?m)^(frontend http_frontend\n\s+bind \S+\n)", rf"\g<1>{rules}", config)


def _without_fallback(config: str) -> str:
    """Leave out Ray's Python proxy: while no replica runs it lets requests wait, and then answers a plain 500."""
    return re.sub(r"(?m)^\s+server \S+ \S+ check backup\n", "", config)


def _replaced(pattern: str, replacement: str, config: str) -> str:
    text, count = re.subn(pattern, replacement, config, count=1)
    if not count:
        raise _not_found(pattern)
    return text


def _not_found(what: str) -> ServerStartError:
    return ServerStartError(f"Ray's configuration of HAProxy has no line for {what}: this version of Ray is not known.")
