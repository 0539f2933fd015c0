"""Requests that cannot be finished before their deadline: the rest is not computed, and the answer is prompt."""

from __future__ import annotations

import asyncio
from collections import Counter

from rich.console import Console

from loadtest.connection import Address
from loadtest.reliability.findings import Finding, at_least, at_most
from loadtest.reliability.options import ExperimentOptions
from loadtest.reliability.served_metrics import total
from loadtest.simulated_server import Simulation, simulated_server
from loadtest.traffic.checking import check
from loadtest.traffic.execution import Exchange, Executor
from loadtest.traffic.items import EqualItems
from loadtest.traffic.phases import BurstStream, Phase, RequestPlanner
from loadtest.traffic.progress import shown_progress

ITEM_TOKENS = 512
PASS_TOKENS = 1024
REQUESTS = 20
TIMEOUT_S = 1.0
WORK_S = 2.5
"""Of each request: an idle service accepts it, since its queue is empty."""
SLACK_S = 0.25
"""For reading and answering a request of many items, beside the time of a pass."""
PASSES_BEYOND = 2
"""A pass that has begun before the deadline may end after it, and the next one is prepared meanwhile."""


def deadlines(options: ExperimentOptions) -> list[Finding]:
    """R19: 20 requests, one after the other, each with two and a half times the work that its deadline has room for."""
    with simulated_server(Simulation(1, 1 / options.tokens_per_s, PASS_TOKENS), options.runtime) as server:
        before = total(server.url, "rm_tokens_total", kind="real")
        exchanges = asyncio.run(_send(server.url, options))
        computed = total(server.url, "rm_tokens_total", kind="real") - before
    codes = Counter(check(exchange, None).code or exchange.failure for exchange in exchanges)
    listed = ", ".join(f"{count} x {code or 'scored'}" for code, count in codes.items())
    in_time = REQUESTS * TIMEOUT_S * options.tokens_per_s
    return [
        Finding("load", "items of a request", len(exchanges[0].request.items)),
        at_least("R19", f"requests that expired ({listed})", codes["deadline_exceeded"], REQUESTS),
        Finding("load", "share of their tokens that was computed", computed / in_time * TIMEOUT_S / WORK_S),
        at_most("R19", "passes beyond what an engine can compute before the deadline, each", (computed - in_time)
            / PASS_TOKENS / REQUESTS, PASSES_BEYOND),
        at_most("R19", "longest time from a deadline to the answer, s", max(
            exchange.service_s for exchange in exchanges) - TIMEOUT_S, PASS_TOKENS / options.tokens_per_s + SLACK_S),
    ]  # fmt: skip


async def _send(url: str, options: ExperimentOptions) -> list[Exchange]:
    executor = Executor(Address.of(url), give_up_s=TIMEOUT_S + 30.0)
    planner = RequestPlanner(
        EqualItems(ITEM_TOKENS, options.seed), timeout_ms=round(1000 * TIMEOUT_S), seed=options.seed
    )
    items = round(WORK_S * options.tokens_per_s / ITEM_TOKENS)
    phase = Phase("deadlines", 0.001, [BurstStream("one", 1, items, train_s=0.0)])
    exchanges: list[Exchange] = []
    async with shown_progress(Console(stderr=True, soft_wrap=True), executor.tally):
        for _ in range(REQUESTS):
            exchanges += (await executor.run(phase, [], planner)).exchanges
            await asyncio.sleep(2 * PASS_TOKENS / options.tokens_per_s)  # the last passes of the request end
    executor.close()
    return exchanges
