"""Measures two running servers alternately on the same passes: while one works, the other is idle.

It depends neither on which servers they are nor on how the results are presented.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from loadtest.generator import send_all
from loadtest.load_shapes import LoadShape, Pass, passes
from loadtest.servers import RunningServer

WARM_UP_GROUPS = 8

QUIET_CORES = 0.1
QUIET_FOR_S = 0.5
QUIET_WITHIN_S = 10.0
"""A server may poll for a while after its last response (vLLM's worker for a second, on a whole core), which must not
slow the other one down."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One server in one round of one shape.

    A server that had fewer cores than the machine has was disturbed by another process.
    """

    server: str
    shape: str
    round: int
    items_per_s: float
    latency_p50_s: float
    latency_p95_s: float

    server_cpu: float
    """Cores that this server used."""

    client_cpu: float
    """Cores that the generator used at the same time."""

    idle_cpu: float
    """Cores that the other, idle server used at the same time."""

    rewards: list[float] = field(repr=False)


def measure_alternately(servers: tuple[RunningServer, RunningServer], planned: Sequence[Pass]) -> Iterator[Measurement]:
    """Yield the measurements of each pass; which server is first alternates, because noise is correlated in time.

    Raises:
        OSError, EOFError: a connection broke.
        UnexpectedAnswer: a server returned something other than rewards.
    """
    for one_pass in planned:
        first, second = servers if one_pass.round % 2 == 0 else reversed(servers)
        for server, idle in ((first, second), (second, first)):
            _await_quiet(servers)
            yield _measure(one_pass, server, idle)


@dataclass(frozen=True, slots=True)
class WarmUp:
    """The uncounted passes of both servers over one shape."""

    shape: str
    num_items: int
    seconds: float


def warm_up(servers: Sequence[RunningServer], shapes: Sequence[LoadShape], seed: int) -> Iterator[WarmUp]:
    """Send a small pass of each shape to each server; how long that takes is a first estimate of the run time.

    Args:
        servers: to warm up.
        shapes: of the measurement.
        seed: of the texts; another one than that of the measurement.
    """
    small = [replace(shape, num_groups=min(shape.num_groups, WARM_UP_GROUPS)) for shape in shapes]
    for one_pass in passes(small, rounds=1, seed=seed):
        started = time.perf_counter()
        for server in servers:
            bodies = [server.wire.body(request) for request in one_pass.requests]
            _ = send_all(server.url, bodies, one_pass.shape.num_connections, server.wire).rewards
        yield WarmUp(one_pass.shape.name, len(servers) * len(one_pass.items), time.perf_counter() - started)


def _await_quiet(servers: Sequence[RunningServer]) -> None:
    """Wait until the servers are idle, but not for ever: the report shows how many cores the idle server used."""
    deadline = time.monotonic() + QUIET_WITHIN_S
    while time.monotonic() < deadline:
        before = sum(server.cpu_s() for server in servers)
        time.sleep(QUIET_FOR_S)
        if sum(server.cpu_s() for server in servers) - before <= QUIET_CORES * QUIET_FOR_S:
            return


def _measure(one_pass: Pass, server: RunningServer, idle: RunningServer) -> Measurement:
    bodies = [server.wire.body(request) for request in one_pass.requests]
    server_before, idle_before = server.cpu_s(), idle.cpu_s()
    run = send_all(server.url, bodies, one_pass.shape.num_connections, server.wire)
    server_after, idle_after = server.cpu_s(), idle.cpu_s()
    rewards = run.rewards
    return Measurement(
        server=server.name,
        shape=one_pass.shape.name,
        round=one_pass.round,
        items_per_s=len(rewards) / run.wall_s,
        latency_p50_s=run.latency_s(0.5),
        latency_p95_s=run.latency_s(0.95),
        server_cpu=(server_after - server_before) / run.wall_s,
        client_cpu=run.cpu_s / run.wall_s,
        idle_cpu=(idle_after - idle_before) / run.wall_s,
        rewards=rewards,
    )
