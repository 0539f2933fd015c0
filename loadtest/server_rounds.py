"""Measures two running servers on the same passes, in turns: one is at work, the other is idle.

It knows neither which servers they are nor what is made of the figures.
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
"""Servers poll for a while after their last answer (vLLM's worker for a second, on a whole core); no other should pay
for that."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one server did with one round of one shape.

    ``server_cpu``, ``client_cpu`` and ``idle_cpu``: cores used meanwhile by this server, by the generator and by the
    other, idle server. A server that got fewer cores than there are was disturbed.
    """

    server: str
    shape: str
    round: int
    items_per_s: float
    latency_p50_s: float
    latency_p95_s: float
    server_cpu: float
    client_cpu: float
    idle_cpu: float
    rewards: list[float] = field(repr=False)


def measure_in_turns(servers: tuple[RunningServer, RunningServer], planned: Sequence[Pass]) -> Iterator[Measurement]:
    """Yield what each server did with each pass. Servers take turns in going first, for noise comes in waves.

    Raises:
        OSError, EOFError: a connection broke.
        UnexpectedAnswer: a server answered something else than rewards.
    """
    for one_pass in planned:
        first, second = servers if one_pass.round % 2 == 0 else reversed(servers)
        for server, idle in ((first, second), (second, first)):
            _await_quiet(servers)
            yield _measure(one_pass, server, idle)


def warm_up(servers: Sequence[RunningServer], shapes: Sequence[LoadShape], seed: int) -> None:
    """Send a small pass of each shape to each server. ``seed``: of texts that are sent at no other time."""
    small = [replace(shape, num_groups=min(shape.num_groups, WARM_UP_GROUPS)) for shape in shapes]
    for server in servers:
        for one_pass in passes(small, rounds=1, seed=seed):
            bodies = [server.wire.body(request) for request in one_pass.requests]
            _ = send_all(server.url, bodies, one_pass.shape.num_connections, server.wire).rewards


def _await_quiet(servers: Sequence[RunningServer]) -> None:
    """Wait until the servers rest. One that never does is measured all the same: its cores stand in the report."""
    give_up = time.monotonic() + QUIET_WITHIN_S
    while time.monotonic() < give_up:
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
