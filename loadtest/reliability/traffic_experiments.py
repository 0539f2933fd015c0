"""Experiments on the load itself: overload and recovery, fairness beside a bulk client, slow clients."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

from rich.console import Console

from loadtest.connection import Address
from loadtest.reliability.findings import Finding, at_least, at_most
from loadtest.reliability.options import ExperimentOptions
from loadtest.simulated_server import Simulation, simulated_server
from loadtest.traffic.arrivals import Arrivals
from loadtest.traffic.checking import oracle_reward_of_item
from loadtest.traffic.execution import Executor
from loadtest.traffic.fault_actions import FaultInjector
from loadtest.traffic.faults import Fault
from loadtest.traffic.items import EqualItems
from loadtest.traffic.phases import OpenStream, Phase, RequestPlanner
from loadtest.traffic.run import PhaseSender
from loadtest.traffic.scenarios import BULK, CAPACITY, RECOVERY, SMALL, FixedPhases, PhaseSource, Scenario
from loadtest.traffic.summary import StreamSummary, recovered_after_s

WITHIN_S = 2.0
OVERLOAD_TOKENS = 512
"""Of an item: at 20,000 tokens/s the capacity is 39 items/s, and tenfold overload leaves cores for the generator."""
SMALL_TOKENS = 512
SLOW_CONNECTIONS = 500


def overload(options: ExperimentOptions) -> list[Finding]:
    """R1 to R4: steps up to ten times the capacity, then a fall to 0.8 of it."""
    scenario = Scenario("overload", options.duration_s, clients=48, factors=(0.8, 1.0, 3.0, 10.0))
    found = {one.stream: one for one in _run(options, scenario, OVERLOAD_TOKENS, [])}
    peak = max(found[CAPACITY].goodput_items_per_s, found["1x"].goodput_items_per_s)
    three, ten = found["3x"], found["10x"]
    recovered = recovered_after_s(found[RECOVERY])
    refused = [one for one in found.values() if one.refusal_s.count]
    return [
        Finding("load", "peak goodput, items/s", peak),
        at_least("R1", "goodput at 3x over peak", three.goodput_items_per_s / peak, 0.9),
        at_least("R1", "goodput at 10x over peak", ten.goodput_items_per_s / peak, 0.75),
        at_most("R2", "p99 of accepted at 3x over p99 at 0.8x", _p99(three) / _p99(found["0.8x"]), 2.0),
        at_most("R2", "p99 of accepted at 3x, s", _p99(three), WITHIN_S),
        at_most("R3", "p99 of refusals at 3x at the client, s", three.refusal_s.quantiles["p99"], 0.25),
        at_most("R3", "p99 of refusals at 10x at the client, s", ten.refusal_s.quantiles["p99"], 0.25),
        at_least("R3", "share of refusals with Retry-After", min(one.retry_after_share or 0.0 for one in refused), 1.0)
        if refused
        else at_least("R3", "refusals", 0, 1),
        at_most("R4", "seconds until goodput is back after 10x", math.inf if recovered is None else recovered, 5.0),
        *_correctness(list(found.values())),
    ]


def fairness(options: ExperimentOptions) -> list[Finding]:
    """R17: requests of one item beside a client that keeps the service busy with requests of 64."""
    scenario = Scenario("mixed", options.duration_s, rate_per_s=4.0, bulk_items=64, bulk_clients=2)
    found = _run(options, scenario, SMALL_TOKENS, [], within_s=30.0)
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


def slow_clients(options: ExperimentOptions) -> list[Finding]:
    """R20: 500 connections of one byte a second beside good requests."""
    stream = OpenStream("good", Arrivals(20.0))
    phases = [Phase("alone", options.duration_s, [stream]), Phase("beside", options.duration_s, [stream])]
    fault = Fault(fault="slow_clients", at_s=options.duration_s, connections=SLOW_CONNECTIONS, for_s=options.duration_s)
    alone, beside = _run(options, FixedPhases(phases), 128, [fault])
    return [
        Finding("load", "p99 alone, s", _p99(alone)),
        Finding("load", "p99 beside 500 slow connections, s", _p99(beside)),
        Finding("load", "p99 of the delay of sending beside them, s", beside.send_lag_s.quantiles["p99"]),
        at_most("R20", "p99 beside 500 slow connections over p99 alone", _p99(beside) / _p99(alone), 1.5),
        at_least("R20", "good items beside them, share", beside.good_items / beside.items, 1.0),
        *_correctness([alone, beside]),
    ]


def _run(
    options: ExperimentOptions,
    source: PhaseSource,
    item_bytes: int,
    schedule: Sequence[Fault],
    *,
    within_s: float = WITHIN_S,
) -> list[StreamSummary]:
    """Run the phases against one replica of the oracle with a delay, and check every reward."""
    simulation = Simulation(1, 1 / options.tokens_per_s, 1024)
    with simulated_server(simulation) as server:
        address = Address.of(server.url)
        planner = RequestPlanner(
            EqualItems(item_bytes, options.seed), timeout_ms=round(1000 * within_s), seed=options.seed
        )
        sender = PhaseSender(planner, within_s=within_s, expected=oracle_reward_of_item)
        injector = FaultInjector(address, server, simulation, options.seed)
        asyncio.run(
            sender.send_all(
                source,
                lambda: Executor(address, give_up_s=within_s + 10.0),
                injector,
                schedule,
                Console(stderr=True, soft_wrap=True),
            )
        )
    return sender.summaries


def _p99(summary: StreamSummary) -> float:
    return summary.latency_s.quantiles["p99"]


def _correctness(summaries: Sequence[StreamSummary]) -> list[Finding]:
    return [
        at_most("R5", "items with a wrong reward", sum(one.wrong_items for one in summaries), 0),
        at_most("load", "answers that are neither rewards nor a problem", sum(one.unexplained for one in summaries), 0),
    ]
