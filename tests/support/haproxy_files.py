"""Configurations of HAProxy as Ray's own code writes them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from serving import free_port


def write_configuration(
    folder: Path,
    port: int,
    replicas: Mapping[str, Sequence[int]],
    *,
    fallback: int | None = None,
    maxconn: int = 64,
) -> Path:
    """Write the configuration for applications that are given by route prefix, with the ports of their replicas."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray's import, which is the first in this process or not
        from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
        from ray.serve.config import HTTPOptions

    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        maxconn=maxconn,
        nbthread=1,
        metrics_port=free_port(),
        stats_port=free_port(),
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        metrics_socket_path=str(folder / "metrics.sock"),
        is_head=True,
    )
    api = HAProxyApi(config, config_file_path=str(folder / "haproxy.cfg"))
    other = None if fallback is None else ServerConfig("fallback", "127.0.0.1", fallback)
    backends = {}
    for prefix, ports in replicas.items():
        name = "http-" + (prefix.strip("/") or "root")
        servers = [ServerConfig(f"replica-{number}", "127.0.0.1", number) for number in ports]
        backends[name] = BackendConfig(name, prefix, app_name=name, servers=servers, fallback_server=other)
    if backends:
        api.set_backend_configs(backends)
    api._generate_config_file_internal()
    return folder / "haproxy.cfg"
