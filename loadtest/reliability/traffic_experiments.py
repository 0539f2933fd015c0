"""Experiments on the load itself: overload and recovery, and fairness beside a bulk client."""

from __future__ import annotations

import asyncio
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from loadtest.connection import Address
from loadtest.reliability.findings import Finding, at_least, at_most
from loadtest.reliability.options import ExperimentOptions
from loadtest.reliability.served_metrics import p99_of_refusals_s
from loadtest.simulated_server import Simulation, simulated_server
from loadtest.traffic.checking import oracle_reward_of_item
from loadtest.traffic.execution import Executor
from loadtest.traffic.fault_actions import FaultInjector
from loadtest.traffic.items import EqualItems
from loadtest.traffic.phases import RequestPlanner
from loadtest.traffic.report import PhaseCost
from loadtest.traffic.run import PhaseSender
from loadtest.traffic.scenarios import BULK, CAPACITY, RECOVERY, SMALL, Scenario
from loadtest.traffic.summary import StreamSummary, recovered_after_s

WITHIN_S = 2.0
OVERLOAD_TOKENS = 512
"""Of an item: at 20,000 tokens/s the capacity is 39 items/s, and tenfold overload leaves cores for the generator."""
SMALL_TOKENS = 512


def overload(options: ExperimentOptions) -> list[Finding]:
    """R1 to R4: steps up to ten times the capacity, then a fall to 0.8 of it."""
    scenario = Scenario("overload", options.duration_s, clients=48, factors=(0.8, 1.0, 3.0, 10.0))
    with tempfile.TemporaryDirectory(prefix="reward-overload-") as folder:
        log = Path(folder) / "requests.jsonl"
        summaries, costs = _run(options, scenario, OVERLOAD_TOKENS, settings={"log": str(log)})
        in_server_s = p99_of_refusals_s(log)
    found = {one.stream: one for one in summaries}
    cost = {one.phase: one for one in costs}
    peak = max(found[CAPACITY].goodput_items_per_s, found["1x"].goodput_items_per_s)
    three, ten = found["3x"], found["10x"]
    recovered = recovered_after_s(found[RECOVERY])
    refused = [one for one in found.values() if one.refusal_s.count]
    return [
        Finding("load", "peak goodput, items/s", peak),
        at_least("R1", "goodput at 3x over peak", three.goodput_items_per_s / peak, 0.9),
        at_least("R1", "goodput at 10x over peak", ten.goodput_items_per_s / peak, 0.75),
        Finding("load", "p99 of accepted at 0.8x, s", _p99(found["0.8x"])),
        Finding("load", "p99 of accepted at 3x over p99 at 0.8x, with the first two seconds, in which the step could "
            "be a burst", _p99(three) / _p99(found["0.8x"])),
        at_most("R2", "p99 of accepted at 3x over p99 at 0.8x, from then on",
            three.settled_latency_s.quantiles["p99"] / _p99(found["0.8x"]), 2.0),
        at_most("R2", "p99 of accepted at 3x, s", _p99(three), WITHIN_S),
        at_most("R3", "p99 of refusals in the server, all phases, s", in_server_s, 0.05),
        at_most("R3", "p99 of refusals at 3x at the client, s", three.refusal_s.quantiles["p99"], 0.25),
        at_most("R3", "p99 of refusals at 10x at the client, s", ten.refusal_s.quantiles["p99"], 0.25),
        at_least("R3", "share of refusals with Retry-After", min(one.retry_after_share or 0.0 for one in refused), 1.0)
        if refused
        else at_least("R3", "refusals", 0, 1),
        at_most("R4", "seconds until goodput is back after 10x", math.inf if recovered is None else recovered, 5.0),
        Finding("load", "cores of the generator at 3x and 10x, the larger", max(
            cost[name].generator_cores for name in ("3x", "10x"))),
        Finding("load", "cores of the server at 3x and 10x, the larger", max(
            cost[name].server_cores or 0.0 for name in ("3x", "10x"))),
        *_correctness(list(found.values())),
    ]  # fmt: skip


def fairness(options: ExperimentOptions) -> list[Finding]:
    """R17: requests of one item beside a client that keeps the service busy with requests of 64."""
    scenario = Scenario("mixed", options.duration_s, rate_per_s=4.0, bulk_items=64, bulk_clients=2)
    found, _ = _run(options, scenario, SMALL_TOKENS, within_s=30.0)
    by = {(one.phase, one.stream): one for one in found}
    alone, beside = by["small alone", SMALL], by["both", SMALL]
    bulk_alone, bulk_beside = by["bulk alone", BULK], by["both", BULK]
    return [
        Finding("load", "p99 of small requests alone, s", _p99(alone)),
        Finding("load", "p99 of small requests beside bulk, s", _p99(beside)),
        at_most("R17", "p99 beside bulk over p99 alone", _p99(beside) / _p99(alone), 3.0),
        at_least(
            "R17", "rate of the bulk client over its rate alone", bulk_beside.answered_items_per_s
            / bulk_alone.answered_items_per_s, 0.8,
        ),
        *_correctness(found),
    ]  # fmt: skip


def _run(
    options: ExperimentOptions,
    scenario: Scenario,
    item_bytes: int,
    *,
    within_s: float = WITHIN_S,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[list[StreamSummary], list[PhaseCost]]:
    """Run the phases against one replica of the oracle with a delay, and check every reward."""
    simulation = Simulation(1, 1 / options.tokens_per_s, 1024, settings=settings)
    with simulated_server(simulation, options.runtime) as server:
        address = Address.of(server.url)
        planner = RequestPlanner(
            EqualItems(item_bytes, options.seed), timeout_ms=round(1000 * within_s), seed=options.seed
        )
        sender = PhaseSender(
            planner,
            within_s=within_s,
            expected=oracle_reward_of_item,
            server_cpu_s=server.cpu_s_by_process,
        )
        injector = FaultInjector(address, server, simulation, options.seed)
        asyncio.run(
            sender.send_all(
                scenario,
                lambda: Executor(address, give_up_s=within_s + 10.0),
                injector,
                [],
                Console(stderr=True, soft_wrap=True),
            )
        )
    return sender.summaries, sender.costs


def _p99(summary: StreamSummary) -> float:
    return summary.latency_s.quantiles["p99"]


def _correctness(summaries: Sequence[StreamSummary]) -> list[Finding]:
    return [
        at_most("R5", "items with a wrong reward", sum(one.wrong_items for one in summaries), 0),
        at_most("load", "answers that are neither rewards nor a problem", sum(one.unexplained for one in summaries), 0),
    ]
