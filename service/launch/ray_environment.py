"""The environment variables for Ray: ports, private sockets, little background work, loopback wherever possible.

Ray reads these variables when it starts, so they are in the environment of the process that starts it, and every other
process inherits them. Pure: it reads and writes nothing. docs/operations.md has the values for starting Ray by other
means.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from service.launch.haproxy import BINARY_VARIABLE, PYTHON_VARIABLE, SCRIPT
from service.launch.ports import Ports

LOOPBACK = "127.0.0.1,localhost,::1"
_REQUEST_PATH = {
    # Replicas exchange data by value; the default limit of 4 MiB is below one large request.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(64 * 1024 * 1024),
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    # A replica whose answer to the question for its queue takes longer would get no shard that is meant for it.
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "1",
    # Requests and answers need not cross between two event loops: the service never blocks its own, long work runs in
    # threads.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # Ray answers 500 to an X-Request-Id that is not UTF-8, before the application could replace it.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "service.http.ray_headers.proxy_middlewares",
}

_PATIENCE = {
    # On a busy machine Ray would kill its own proxies, workers and node because they have not started in a few seconds.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S": "120",
    "RAY_gcs_server_port_wait_time_s": "120",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_health_check_timeout_ms": "60000",
}

_QUIET_BACKGROUND = {
    # Serve's controller would run its control loop ten times a second; at twice a second a start, a shutdown and the
    # replacement of a dead replica take as many seconds as before.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # Ray's metrics about itself, which nothing scrapes here: /metrics is the service's own.
    "RAY_enable_metrics_collection": "0",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    # One machine has nothing to scale.
    "AUTOSCALER_UPDATE_INTERVAL_S": "60",
    # Ray's log monitor would forward logs to a driver that ignores them, and scan for new files ten times a second.
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "3600",
}
"""Keeps Ray's background work off the cores of the forward pass; docs/decisions/0018 has the effect of each."""


def max_connections_within(open_files: int) -> int:
    """Return how many connections HAProxy may hold under a limit of open files, with a reserve of 1,000.

    A connection needs two, for its client and its replica, and HAProxy reserves a pipe of two for every fourth one. It
    does not start where the limit is below their sum.
    """
    return max(1024, min(16_384, (open_files - 1000) * 2 // 5))


def ray_environment(
    folder: Path,
    ports: Ports,
    token: Path,
    *,
    cores: int,
    deadline_s: float,
    drain_s: float,
    max_connections: int = 4096,
) -> dict[str, str]:
    """Return the variables for a server whose private files are in ``folder``.

    Args:
        folder: readable by this user only, with a path short enough for Unix sockets.
        ports: as chosen.
        token: file with the token of Ray's control plane.
        cores: of this machine; HAProxy gets up to four threads.
        deadline_s: longest time to an answer; HAProxy must not cut a connection before it.
        drain_s: how long a replica that leaves stays reachable.
        max_connections: of HAProxy.
    """
    return (
        _proxy_environment(
            folder, ports, cores=cores, deadline_s=deadline_s, drain_s=drain_s, max_connections=max_connections
        )
        | _REQUEST_PATH
        | {
            # Keeps Ray's own ports on loopback; the name is about other systems, the effect is the same on Linux.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            # By default Ray's workers yield to everything else on the machine; here the replica is its purpose.
            "RAY_worker_niceness": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "AUTOSCALER_METRIC_PORT": str(ports.autoscaler_metrics),
            "DASHBOARD_METRIC_PORT": str(ports.dashboard_metrics),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_EXPORT_COUNTER_AS_GAUGE": "0",
        }
        | _PATIENCE
        | _QUIET_BACKGROUND
    )


def direct_loopback(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that keep calls to this machine off the proxies that an environment names.

    gRPC, over which replicas call each other, obeys them too, and has a variable of its own.
    """
    names = ("no_proxy", "NO_PROXY", "no_grpc_proxy")
    given = next((environment[name] for name in names if environment.get(name)), "")
    return {name: ",".join(filter(None, [environment.get(name) or given, LOOPBACK])) for name in names}


def _proxy_environment(
    folder: Path, ports: Ports, *, cores: int, deadline_s: float, drain_s: float, max_connections: int
) -> dict[str, str]:
    return {
        # One HAProxy instead of Ray's Python proxy: a tenth of the latency and ten times the requests.
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, cores)),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(int(deadline_s) + 30),
        # A connection that sends nothing for so long is closed; one that waits for its answer is not.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "30",
        # Idle connections beyond Ray's default of 4,096 would keep everybody out; two take five open files.
        "RAY_SERVE_HAPROXY_MAXCONN": str(max_connections),
        # A dead replica is noticed in two seconds instead of ten, and one that has stopped answering in ten. Where all
        # count as dead nobody is answered, so one that is busy must not: it has two seconds to answer a check
        # (haproxy_config.py). One that drains fails its checks while it serves; it is needed until its successor is
        # known, a second later, so two failures must not be enough.
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL": "4",
        # A dead HAProxy is replaced in seconds: three checks have to fail.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        # It changes Ray's configuration of HAProxy before it becomes HAProxy.
        BINARY_VARIABLE: str(SCRIPT),
        PYTHON_VARIABLE: sys.executable,
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports.proxy_metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.proxy_stats),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.fallback),
        # The fallback proxy would share its port with whoever asks for it.
        "SERVE_SOCKET_REUSE_PORT_ENABLED": "0",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports.replicas.start),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports.replicas.stop),
        # Until a number is used again. All replicas of these numbers serve the same model.
        "RAY_SERVE_PORT_QUARANTINE_S": "60",
        # Whoever can open HAProxy's admin socket can control it.
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(drain_s),
    }
