"""A rolling update under load, then one to a model that cannot start: no request fails, and every reward is right."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich.console import Console

from loadtest.connection import Address
from loadtest.reliability.findings import Finding, at_most
from loadtest.reliability.options import ExperimentOptions
from loadtest.simulated_server import SimulatedServer, Simulation, simulated_server
from loadtest.traffic.checking import oracle_reward_of_item
from loadtest.traffic.execution import Exchange, Executor
from loadtest.traffic.items import EqualItems
from loadtest.traffic.phases import ClosedStream, Phase, RequestPlanner
from loadtest.traffic.progress import shown_progress
from loadtest.traffic.summary import StreamSummary, summarize

REPLICAS = 2
CLIENTS = 8
REPLACED_WITHIN_S = 120.0
BAD_SALT = "x" * 65
"""BLAKE2b refuses a key of more than 64 bytes, so the warm-up of the new replicas fails."""
REFUSED_WITHIN_S = 180.0
FAILED_STATES = frozenset({"DEPLOY_FAILED", "UNHEALTHY"})


def rolling_update(options: ExperimentOptions) -> list[Finding]:
    """R8, R9: ``serve deploy`` under load of clients that repeat nothing, of a good model and then of a bad one."""
    simulation = Simulation(REPLICAS, 1 / options.tokens_per_s, 4096, oracle={"salt": "a"})
    with simulated_server(simulation) as server:
        before = {process.pid for process in server.processes("replica")}

        def is_replaced() -> bool:
            return not before & {process.pid for process in server.processes("replica")}

        def is_refused() -> bool:
            return server.application_state() in FAILED_STATES

        good = replace(simulation, oracle={"salt": "b"})
        update = asyncio.run(_update_under_load(server, good, is_replaced, REPLACED_WITHIN_S))
        bad = replace(simulation, oracle={"salt": BAD_SALT})
        refused = asyncio.run(_update_under_load(server, bad, is_refused, REFUSED_WITHIN_S))
    return [
        *update.findings("update"),
        at_most("R9", "seconds until both replicas were replaced", update.seconds, REPLACED_WITHIN_S),
        *refused.findings("bad model"),
        at_most("R9", "bad model: seconds until Ray had given it up", refused.seconds, REFUSED_WITHIN_S),
        at_most("R9", "bad model: answers of another version than before", refused.answers_of_others("oracle-b"), 0),
    ]


@dataclass(frozen=True, slots=True)
class Update:
    """What callers got during a ``serve deploy``."""

    seconds: float
    """Until it had its effect; infinite where it had none."""
    summaries: Sequence[StreamSummary]
    versions: Counter[str]
    """Answers by the version that they name."""

    def findings(self, name: str) -> list[Finding]:
        """Return what holds for every update."""
        statuses = {status for one in self.summaries for status in one.statuses}
        failed = sum(count for one in self.summaries for status, count in one.statuses.items() if status != "200")
        wrong = sum(one.wrong_items for one in self.summaries)
        return [
            Finding("load", f"{name}: requests", sum(one.requests for one in self.summaries)),
            at_most("R8", f"{name}: requests that failed (statuses {', '.join(sorted(statuses))})", failed, 0),
            at_most("R9", f"{name}: rewards that are not of the answer's version", wrong, 0),
        ]

    def answers_of_others(self, version: str) -> int:
        """Return the number of answers that name another version."""
        return self.versions.total() - self.versions[version]


async def _update_under_load(
    server: SimulatedServer, simulation: Simulation, is_done: Callable[[], bool], within_s: float
) -> Update:
    """Deploy, and send in phases of two seconds until the deploy has had its effect."""
    executor = Executor(Address.of(server.url), give_up_s=90.0)
    planner = RequestPlanner(EqualItems(128, seed=31), timeout_ms=None, seed=0)
    phase = Phase("update", 2.0, [ClosedStream("update", CLIENTS, 4)])
    deploy = asyncio.create_task(asyncio.to_thread(server.redeploy, simulation))
    summaries: list[StreamSummary] = []
    versions = Counter[str]()
    began = time.monotonic()
    seconds = math.inf
    async with shown_progress(Console(stderr=True, soft_wrap=True), executor.tally):
        while math.isinf(seconds) and time.monotonic() < began + within_s:
            run = await executor.run(phase, [], planner)
            summaries += summarize(run, within_s=60.0, expected=oracle_reward_of_item)
            versions.update(_version(one) for one in run.exchanges if one.status == 200)
            if deploy.done() and await asyncio.to_thread(is_done):
                seconds = time.monotonic() - began
    executor.close()
    await deploy
    return Update(seconds, summaries, versions)


def _version(exchange: Exchange) -> str:
    return str(json.loads(exchange.content)["model"]["version"])
