"""The TCP ports of a server: the requested one for HTTP, free ones for Ray's own parts.

Whether a port is free is tried by binding it for a moment.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

from service.errors import ServerStartError


@dataclass(frozen=True, slots=True)
class Ports:
    """TCP ports of one server. Only ``http`` is for clients; the rest are for Ray's own parts.

    HAProxy opens ``proxy_metrics`` and ``proxy_stats`` on all interfaces; no setting changes that.
    """

    http: int
    """HTTP of the service, through HAProxy."""
    proxy_metrics: int = 9101
    """HAProxy's metrics."""
    proxy_stats: int = 8404
    """HAProxy's statistics page."""
    fallback: int = 8500
    """Serve's fallback proxy, in Python."""
    autoscaler_metrics: int = 44217
    """Metrics of Ray's autoscaler."""
    dashboard_metrics: int = 44227
    """Metrics of Ray's dashboard process."""


def choose_ports(host: str, http: int) -> Ports:
    """Take the requested HTTP port, and for the rest the default numbers or, where they are taken, any free ones.

    Raises:
        ServerStartError: the HTTP port is in use, or the host is not an address of this machine.
    """
    try:
        _bind(host, http)
    except OSError as error:
        raise ServerStartError(
            f"Cannot listen on {host} port {http}: {(error.strerror or str(error)).lower()}."
        ) from None
    defaults = Ports(http)
    taken = {http}
    chosen = {}
    for name in ("proxy_metrics", "proxy_stats", "fallback", "autoscaler_metrics", "dashboard_metrics"):
        chosen[name] = _default_or_free(getattr(defaults, name), taken)
        taken.add(chosen[name])
    return Ports(http, **chosen)


def _default_or_free(default: int, taken: set[int]) -> int:
    for port in (default, *([0] * 20)):
        try:
            free = _bind("", port)
        except OSError:
            continue
        if free not in taken:
            return free
    raise ServerStartError("There is no free TCP port on this machine.")


def _bind(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        return int(probe.getsockname()[1])


def reachable(host: str) -> str:
    """An address under which this machine reaches a server that listens on ``host``."""
    local = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - compared, not bound
    return local.get(host, f"[{host}]" if ":" in host else host)
