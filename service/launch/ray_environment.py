"""What Ray is told through its environment: ports, private sockets, a quiet terminal, and loopback wherever it can.

Ray reads these variables when it starts, so they stand in the environment of the process that starts it and are
inherited by all others. Pure but for looking for free ports; it starts nothing. The same values, for starting Ray by
other means, are in docs/operations.md.
"""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import ServerStartError

_QUIET_BACKGROUND = {
    # Ten times a second Serve's controller would look after everything; with two looks a start, an end and the
    # replacement of a dead replica take as many seconds as before.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # Ray's metrics of itself, which nobody scrapes here: /metrics is ours.
    "RAY_enable_metrics_collection": "0",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    # One machine has nothing to scale.
    "AUTOSCALER_UPDATE_INTERVAL_S": "60",
    # It would carry logs to a driver that does not want them, and looks for new files ten times a second.
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "3600",
}
"""Keeps Ray's background work off the cores of the forward pass; docs/decisions/0018 has what each is worth."""


@dataclass(frozen=True, slots=True)
class Ports:
    """TCP ports of one server. Only ``http`` is meant for others; the rest are for Ray's own parts.

    ``proxy_metrics`` and ``proxy_stats`` belong to HAProxy, which opens them on all interfaces whatever it is told.
    """

    http: int
    proxy_metrics: int = 9101
    proxy_stats: int = 8404
    fallback: int = 8500
    autoscaler_metrics: int = 44217
    dashboard_metrics: int = 44227


@dataclass(frozen=True, slots=True)
class Launch:
    """What the start command tells the process that runs Ray; travels as one JSON line.

    ``cpus`` and ``gpus`` are per replica. ``drain_s``: seconds for accepted requests once the end is announced.
    """

    settings: dict[str, Any]
    folder: str
    host: str
    port: int
    replicas: int
    cpus: int
    gpus: int
    drain_s: float


def choose_ports(host: str, http: int) -> Ports:
    """Take the asked HTTP port, and for the rest the usual numbers or, where they are taken, any free ones.

    Raises:
        ServerStartError: something listens on the HTTP port already, or the host is not an address of this machine.
    """
    try:
        _bind(host, http)
    except OSError as error:
        raise ServerStartError(
            f"Cannot listen on {host} port {http}: {(error.strerror or str(error)).lower()}."
        ) from None
    usual = Ports(http)
    taken = {http}
    rest = {}
    for name in ("proxy_metrics", "proxy_stats", "fallback", "autoscaler_metrics", "dashboard_metrics"):
        rest[name] = _usual_or_free(getattr(usual, name), taken)
        taken.add(rest[name])
    return Ports(http, **rest)


def _usual_or_free(usual: int, taken: set[int]) -> int:
    for port in (usual, *([0] * 20)):
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


def ray_environment(folder: Path, ports: Ports, *, deadline_s: float, drain_s: float) -> dict[str, str]:
    """Return the variables for a server whose private files lie in ``folder``; writes the control plane's token there.

    Args:
        folder: readable by this user only, with a path short enough for Unix sockets.
        ports: as chosen.
        deadline_s: longest time to an answer; HAProxy must not cut a connection before it.
        drain_s: how long a replica that leaves stays reachable.
    """
    return {
        # One HAProxy instead of Ray's Python proxy: a tenth of the latency and ten times the requests.
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(int(deadline_s) + 30),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports.proxy_metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.proxy_stats),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.fallback),
        # Its admin socket obeys whoever can open it.
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(drain_s),
        # What replicas tell each other travels by value; the default cap of 4 MiB is below one large request.
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(64 * 1024 * 1024),
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
        # Requests and answers need not hop between two event loops: ours never stands still, long work is in threads.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        # Keeps Ray's own ports on loopback; its name speaks of other systems, its effect is the same on Linux.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Ray's workers yield to everything else on the machine by default; here the replica is what the machine is for.
        "RAY_worker_niceness": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(_write_token(folder)),
        "AUTOSCALER_METRIC_PORT": str(ports.autoscaler_metrics),
        "DASHBOARD_METRIC_PORT": str(ports.dashboard_metrics),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_EXPORT_COUNTER_AS_GAUGE": "0",
        **_QUIET_BACKGROUND,
    }


def _write_token(folder: Path) -> Path:
    path = folder / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32), encoding="ascii")
    return path
