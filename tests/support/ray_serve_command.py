"""The environment of Ray's own commands, as docs/serve.env documents it, with ports and folders of one test."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from serving import free_port

ROOT = Path(__file__).parents[2]


def documented_environment(*, ha_proxy: bool, folder: str) -> dict[str, str]:
    """The environment of docs/serve.env, with ports and folders of its own."""
    lines = (ROOT / "docs" / "serve.env").read_text().splitlines()
    documented = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    own = {
        "RAY_SERVE_ENABLE_HA_PROXY": str(int(ha_proxy)),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": folder,
        "AUTOSCALER_METRIC_PORT": str(free_port()),
        "DASHBOARD_METRIC_PORT": str(free_port()),
    }
    return {**os.environ, **documented, **own}
