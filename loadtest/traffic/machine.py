"""Facts about the machine and the server that a figure needs to mean anything."""

from __future__ import annotations

import os
import platform
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from service.errors import ServerStartError
from service.version import distribution_version

ANSWER_WITHIN_S = 30.0
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""A generator measures the server, not a proxy that the environment names."""


def machine_facts() -> dict[str, Any]:
    """Return the kind of CPU, the cores of this process, and the version of the distribution."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "version": distribution_version(),
    }


def server_facts(url: str, headers: Mapping[str, str]) -> dict[str, Any]:
    """Return the answer of ``/v1/model``.

    Raises:
        ServerStartError: there is no such server, or it does not answer with its model.
    """
    request = urllib.request.Request(f"{url.rstrip('/')}/v1/model", headers=dict(headers))  # noqa: S310 - checked URL
    try:
        with _DIRECT.open(request, timeout=ANSWER_WITHIN_S) as answer:
            facts: dict[str, Any] = msgspec.json.decode(answer.read(), type=dict)
            return facts
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise ServerStartError(
                f"{url} answers {error.code}: it needs a key with the scope score; give --api-key or REWARD_API_KEY."
            ) from None
        raise ServerStartError(f"{url}/v1/model answers {error.code}, so this is no server to measure.") from None
    except (OSError, msgspec.DecodeError, msgspec.ValidationError) as error:
        reason = getattr(error, "reason", None) or error
        raise ServerStartError(f"{url} does not answer: {reason}.") from None


def _cpu_name() -> str:
    """Return the name of the CPU as Linux gives it; else what Python knows."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
