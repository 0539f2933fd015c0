"""Closes connections to the local runtime on which no request arrives; with Ray HAProxy does this.

uvicorn bounds how long a connection is idle after an answer, but not how long the head of a request takes, nor how long
a connection waits for its first one. Each is an open file, and a process may have a limited number of them.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Collection
from typing import Any

from service.launch.haproxy_config import HEAD_S

CHECK_S = 1.0
"""Seconds between two looks at all connections."""


def allow_many_files() -> None:
    """Let this process open as many files as it may without more rights."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def close_slow_heads(connections: Collection[Any], head_s: float = HEAD_S) -> None:
    """Close every connection that has waited longer for the head of a request; never returns.

    Args:
        connections: uvicorn's protocol objects of all open connections, which it keeps up to date.
        head_s: seconds.
    """
    clock = asyncio.get_running_loop().time
    since: dict[Any, float] = {}
    while True:
        await asyncio.sleep(CHECK_S)
        now = clock()
        since = {connection: since.get(connection, now) for connection in connections if _waits_for_head(connection)}
        for connection, begin in since.items():
            if now - begin > head_s:
                connection.transport.abort()


def _waits_for_head(connection: Any) -> bool:
    """Whether a connection has no request, nor is idle after an answer, for which uvicorn has a timer of its own."""
    cycle = connection.cycle
    return connection.timeout_keep_alive_task is None and (cycle is None or cycle.response_complete)
