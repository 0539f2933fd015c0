"""Slow clients: requests of others are answered as fast as without them."""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass

from rich.console import Console

from loadtest.connection import Address
from loadtest.reliability.findings import Finding, at_least, at_most
from loadtest.reliability.options import ExperimentOptions
from loadtest.simulated_server import SimulatedServer, Simulation, simulated_server
from loadtest.traffic.arrivals import Arrivals
from loadtest.traffic.checking import oracle_reward_of_item
from loadtest.traffic.execution import Executor
from loadtest.traffic.items import EqualItems
from loadtest.traffic.phases import OpenStream, Phase, RequestPlanner
from loadtest.traffic.progress import shown_progress
from loadtest.traffic.slow_clients import slow_clients
from loadtest.traffic.summary import StreamSummary, summarize

CONNECTIONS = 500
REQUESTS_PER_S = 20.0
ITEM_BYTES = 128
WITHIN_S = 2.0
ROUNDS = 3
"""Of each way, alternately: one stall of a busy machine is the 99th percentile of a round."""
WARM_UP_S = 3.0


@dataclass(frozen=True, slots=True)
class Round:
    """One phase."""

    good: StreamSummary
    server_cores: float
    """CPU seconds of the server per second."""
    closed_by_server: int = 0

    @property
    def p99_s(self) -> float:
        """Of the good requests, from the first byte sent."""
        return self.good.service_s.quantiles["p99"]


def slow_connections(options: ExperimentOptions) -> list[Finding]:
    """R20: 500 connections of one byte a second, from a process of their own, beside good requests."""
    simulation = Simulation(1, 1 / options.tokens_per_s, 1024)
    with simulated_server(simulation, options.runtime) as server:
        alone, beside = asyncio.run(_measure(options, server))
    p99_alone, p99_beside = (statistics.median(one.p99_s for one in rounds) for rounds in (alone, beside))
    good, items = (sum(getattr(one.good, name) for one in beside) for name in ("good_items", "items"))
    return [
        Finding("load", "rounds of each way", ROUNDS),
        Finding("load", "p99 alone, s", p99_alone),
        Finding("load", "p99 beside 500 slow connections, s", p99_beside),
        Finding("load", "p99 of the delay of sending beside them, s", max(
            one.good.send_lag_s.quantiles["p99"] for one in beside)),
        Finding("load", "cores of the server alone", statistics.median(one.server_cores for one in alone)),
        Finding("load", "cores of the server beside them", statistics.median(one.server_cores for one in beside)),
        Finding("load", "slow connections that the server closed", sum(one.closed_by_server for one in beside)),
        at_most("R20", "p99 beside 500 slow connections over p99 alone, medians", p99_beside / p99_alone, 1.5),
        at_least("R20", "good items beside them, share", good / items, 1.0),
        at_most("R5", "items with a wrong reward", sum(one.good.wrong_items for one in (*alone, *beside)), 0),
    ]  # fmt: skip


async def _measure(options: ExperimentOptions, server: SimulatedServer) -> tuple[list[Round], list[Round]]:
    """Return the rounds alone and the rounds beside slow connections."""
    address = Address.of(server.url)
    executor = Executor(address, give_up_s=WITHIN_S + 10.0)
    planner = RequestPlanner(EqualItems(ITEM_BYTES, options.seed), timeout_ms=round(1000 * WITHIN_S), seed=options.seed)
    alone: list[Round] = []
    beside: list[Round] = []

    async def send(name: str, seconds: float) -> Round:
        phase = Phase(name, seconds, [OpenStream("good", Arrivals(REQUESTS_PER_S))])
        before = sum(server.cpu_s().values())
        run = await executor.run(phase, planner.schedule(phase, len(alone) + len(beside)), planner)
        cores = (sum(server.cpu_s().values()) - before) / run.wall_s
        (summary,) = summarize(run, within_s=WITHIN_S, expected=oracle_reward_of_item)
        return Round(summary, cores)

    async with shown_progress(Console(stderr=True, soft_wrap=True), executor.tally):
        await send("warm-up", WARM_UP_S)
        for number in range(1, ROUNDS + 1):
            alone.append(await send(f"alone, round {number}", options.duration_s))
            async with slow_clients(address, CONNECTIONS) as held:
                one = await send(f"beside, round {number}", options.duration_s)
            beside.append(Round(one.good, one.server_cores, held.closed_by_server))
    executor.close()
    return alone, beside
