"""A rolling update under load: no request fails, and every reward is right."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import replace

from loadtest.connection import Address
from loadtest.reliability.findings import Finding, at_most
from loadtest.reliability.options import ExperimentOptions
from loadtest.simulated_server import SimulatedServer, Simulation, simulated_server
from loadtest.traffic.checking import oracle_reward_of_item
from loadtest.traffic.execution import Executor
from loadtest.traffic.items import EqualItems
from loadtest.traffic.phases import ClosedStream, Phase, RequestPlanner
from loadtest.traffic.summary import StreamSummary, summarize

REPLICAS = 2
CLIENTS = 8
REPLACED_WITHIN_S = 120.0


def rolling_update(options: ExperimentOptions) -> list[Finding]:
    """R8, R9: ``serve deploy`` with another salt replaces both replicas while clients that repeat nothing send."""
    simulation = Simulation(REPLICAS, 1 / options.tokens_per_s, 4096, oracle={"salt": "a"})
    with simulated_server(simulation) as server:
        before = {process.pid for process in server.processes("replica")}
        seconds, summaries = asyncio.run(_send_while_updating(server, simulation, before))
    statuses = {status for one in summaries for status in one.statuses}
    failed = sum(count for one in summaries for status, count in one.statuses.items() if status != "200")
    return [
        Finding("load", "requests", sum(one.requests for one in summaries)),
        at_most("R8", f"requests that failed (statuses {', '.join(sorted(statuses))})", failed, 0),
        at_most("R9", "rewards that are not of the answer's version", sum(one.wrong_items for one in summaries), 0),
        at_most("R9", "seconds until both replicas were replaced", seconds, REPLACED_WITHIN_S),
    ]


async def _send_while_updating(
    server: SimulatedServer, simulation: Simulation, before: set[int]
) -> tuple[float, list[StreamSummary]]:
    """Send in phases of two seconds until no replica of the old version is left; the seconds are infinite if one is."""
    executor = Executor(Address.of(server.url), give_up_s=90.0)
    planner = RequestPlanner(EqualItems(128, seed=31), timeout_ms=None, seed=0)
    phase = Phase("update", 2.0, [ClosedStream("update", CLIENTS, 4)])
    update = asyncio.create_task(asyncio.to_thread(server.redeploy, replace(simulation, oracle={"salt": "b"})))
    summaries: list[StreamSummary] = []
    began = time.monotonic()
    seconds = math.inf
    while math.isinf(seconds) and time.monotonic() < began + REPLACED_WITHIN_S:
        run = await executor.run(phase, [], planner)
        summaries += summarize(run, within_s=60.0, expected=oracle_reward_of_item)
        if update.done() and not before & {process.pid for process in server.processes("replica")}:
            seconds = time.monotonic() - began
    executor.close()
    await update
    return seconds, summaries
