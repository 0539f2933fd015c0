"""The TCP ports of a server: the requested one for HTTP, and a block of numbers for Ray's own parts.

Ray binds its ports long after they have been chosen, and HAProxy goes on sending requests to the port of a replica that
has died. So each server has a block of consecutive numbers that no other server on the machine uses, for its whole
life: the answer to a request can never come from the replica or the proxy of another server. A server owns the block
whose first port it has bound. The kernel lets one process bind it, of whatever user, and frees it with the last process
that holds it.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from service.errors import ServerStartError

FIRST_PORT, LAST_PORT = 21_000, 23_999
"""Blocks lie here: below the ports that Linux gives out by itself, and above those that Ray's workers may take."""
BLOCK_PORTS = 50
"""Numbers of one block."""
PORTS_PER_REPLICA = 4
"""Numbers for each replica: Ray gives one that takes another's place a number of its own."""
_OWNER, _FIXED = 1, 5


@dataclass(frozen=True, slots=True)
class Ports:
    """TCP ports of one server. Only ``http`` is for clients; the rest are for Ray's own parts."""

    http: int
    """HTTP of the service, through HAProxy."""
    proxy_metrics: int
    """HAProxy's metrics."""
    proxy_stats: int
    """HAProxy's statistics page."""
    fallback: int
    """Serve's fallback proxy, in Python."""
    autoscaler_metrics: int
    """Metrics of Ray's autoscaler."""
    dashboard_metrics: int
    """Metrics of Ray's dashboard process."""
    replicas: range
    """For the HTTP servers of replicas, one each."""


Owners = tuple[int, ...]
"""File descriptors. What they stand for is reserved while any process holds one of them open."""


@contextmanager
def reserved_http(host: str, port: int) -> Iterator[Owners]:
    """Check that the port of HTTP is free, and refuse other servers that start on it before HAProxy listens there.

    Raises:
        ServerStartError: the port is in use, or the host is not an address of this machine.
    """
    if FIRST_PORT <= port <= LAST_PORT:
        raise ServerStartError(
            f"Port {port} cannot be the one of HTTP: {FIRST_PORT} to {LAST_PORT} are for Ray's own parts of all "
            "servers on this machine. Choose another with --port."
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
        owner = _named(f"reward-serve {host} {port}")
    except (OSError, UnicodeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise ServerStartError(f"Cannot listen on {host} port {port}: {reason}.") from None
    with owner:
        yield (owner.fileno(),)


@contextmanager
def reserved_block(http: int, replicas: int) -> Iterator[tuple[Ports, Owners]]:
    """Reserve ports for Ray that no other server on this machine uses.

    Raises:
        ServerStartError: too few are free.
    """
    num_blocks = -(-(_OWNER + _FIXED + PORTS_PER_REPLICA * replicas) // BLOCK_PORTS)
    with ExitStack() as held:
        owners, block = _reserve_block(num_blocks, held)
        names = ("proxy_metrics", "proxy_stats", "fallback", "autoscaler_metrics", "dashboard_metrics")
        fixed = dict(zip(names, block[:_FIXED], strict=True))
        ports = Ports(http, **fixed, replicas=range(block[_FIXED], block[-1] + 1))
        yield ports, tuple(owner.fileno() for owner in owners)


def _named(name: str) -> socket.socket:
    """A socket that owns a name in this network namespace, where its system has such names without files (Linux).

    A bound TCP socket cannot serve for the port of HTTP: HAProxy could not bind the port beside it.
    """
    owner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if sys.platform == "linux":
            owner.bind(f"\0{name}")
    except OSError:
        owner.close()
        raise
    return owner


def _reserve_block(num_blocks: int, held: ExitStack) -> tuple[list[socket.socket], list[int]]:
    """Bind the first port of as many adjacent blocks; return the bound sockets, and the other ports of these blocks."""
    length = num_blocks * BLOCK_PORTS
    for first in range(FIRST_PORT, LAST_PORT + 2 - length, BLOCK_PORTS):
        firsts = range(first, first + length, BLOCK_PORTS)
        others = [port for port in range(first, first + length) if port not in firsts]
        with ExitStack() as attempt, suppress(OSError):
            owners = [attempt.enter_context(_bound(port, shareable=False)) for port in firsts]
            # Also what an earlier server may have left: its proxy and its replicas lie in its block.
            for port in others:
                _bound(port, shareable=port >= first + _OWNER + _FIXED).close()
            held.enter_context(attempt.pop_all())
            return owners, others
    raise ServerStartError(
        f"This machine has no {length} free TCP ports in a row from {FIRST_PORT} to {LAST_PORT}: stop another server."
    )


def _bound(port: int, *, shareable: bool) -> socket.socket:
    """A socket that is bound to a port on all interfaces; not shareable: the port waits for no closed connection."""
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if shareable:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("", port))
    except OSError:
        bound.close()
        raise
    return bound


def reachable(host: str) -> str:
    """An address under which this machine reaches a server that listens on ``host``."""
    local = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - compared, not bound
    return local.get(host, f"[{host}]" if ":" in host else host)
