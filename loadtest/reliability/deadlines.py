"""Deadlines shorter than the queue: what expired is not computed, and no answer comes long after its deadline."""

from __future__ import annotations

import asyncio

from rich.console import Console

from loadtest.connection import Address
from loadtest.reliability.findings import Finding, at_least, at_most
from loadtest.reliability.options import ExperimentOptions
from loadtest.reliability.served_metrics import total
from loadtest.simulated_server import Simulation, simulated_server
from loadtest.traffic.checking import oracle_reward_of_item
from loadtest.traffic.execution import Executor, PhaseRun
from loadtest.traffic.items import EqualItems
from loadtest.traffic.phases import BurstStream, Phase, RequestPlanner
from loadtest.traffic.progress import shown_progress
from loadtest.traffic.summary import summarize

ITEM_TOKENS = 512
PASS_TOKENS = 1024
REQUESTS = 400
TIMEOUT_S = 2.0
SLACK_S = 0.25
"""For reading and answering hundreds of requests at once, beside the time of a pass."""


def deadlines(options: ExperimentOptions) -> list[Finding]:
    """R19: 400 requests at once with deadlines that a tenth of them can keep.

    The service has just started and does not know its speed yet, so it accepts all of them.
    """
    with simulated_server(Simulation(1, 1 / options.tokens_per_s, PASS_TOKENS)) as server:
        before = total(server.url, "rm_tokens_total", kind="real")
        run = asyncio.run(_send(server.url, options.seed))
        computed = total(server.url, "rm_tokens_total", kind="real") - before
    (summary,) = summarize(run, within_s=TIMEOUT_S, expected=oracle_reward_of_item)
    answered = summary.statuses.get("200", 0)
    return [
        Finding("load", "requests at once", summary.requests),
        Finding("load", "of them answered in time", answered),
        at_least("R19", "of them expired (504)", summary.statuses.get("504", 0), 1),
        at_most("R19", "of them with another answer, or none", summary.requests - answered - summary.statuses.get(
            "504", 0), 0),
        # A pass that has begun before the deadline may end after it, and the next one is prepared meanwhile.
        at_most("R19", "passes computed for requests that had expired", (computed - answered * ITEM_TOKENS)
            / PASS_TOKENS, 2.0),
        at_most("R19", "longest time from a deadline to the answer, s", _latest_s(run) - TIMEOUT_S,
            PASS_TOKENS / options.tokens_per_s + SLACK_S),
        at_most("R5", "items with a wrong reward", summary.wrong_items, 0),
    ]  # fmt: skip


def _latest_s(run: PhaseRun) -> float:
    """Return the longest time from sending a request to its answer."""
    return max(exchange.service_s for exchange in run.exchanges)


async def _send(url: str, seed: int) -> PhaseRun:
    executor = Executor(Address.of(url), give_up_s=TIMEOUT_S + 30.0)
    planner = RequestPlanner(EqualItems(ITEM_TOKENS, seed), timeout_ms=round(1000 * TIMEOUT_S), seed=seed)
    phase = Phase("deadlines", 0.001, [BurstStream("burst", REQUESTS, train_s=0.0)])
    async with shown_progress(Console(stderr=True, soft_wrap=True), executor.tally):
        run = await executor.run(phase, [], planner)
    executor.close()
    return run
