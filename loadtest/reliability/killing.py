"""Processes are killed under load: every item is answered once through the client, and the service comes back."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from loadtest.connection import Address
from loadtest.reliability.findings import Finding, at_least, at_most
from loadtest.reliability.ledger import Ledger, keep_ledger
from loadtest.reliability.options import ExperimentOptions
from loadtest.simulated_server import Simulation, simulated_server
from loadtest.traffic.execution import Exchange, Executor
from loadtest.traffic.fault_actions import CausedFault, FaultInjector
from loadtest.traffic.faults import Fault
from loadtest.traffic.items import EqualItems
from loadtest.traffic.phases import ClosedStream, Phase, RequestPlanner
from loadtest.traffic.summary import OVERLOADED

REPLICAS = 2
ITEM_BYTES = 128
CLIENTS = 16
ITEMS_PER_CALL = 64
RAW_CLIENTS = 4
"""Clients beside the ledger's that send single items and repeat nothing."""
RESUMES_WITHIN_S = 10.0
AFTERWARDS_S = 120.0
"""Longest time for which the raw clients go on after the ledger, until they have seen the end of a fault."""


def killed_replicas(options: ExperimentOptions) -> list[Finding]:
    """R5, R6, R7: ``kill -9`` of a replica every 8 seconds, two replicas, through the client and beside it."""
    fault = Fault(fault="kill_replica", at_s=options.kill_every_s, every_s=options.kill_every_s)
    return _killed(options, options.items, fault, "R7")


def killed_proxy(options: ExperimentOptions) -> list[Finding]:
    """R25: HAProxy is killed under load."""
    return _killed(options, options.items // 10, Fault(fault="kill_proxy", at_s=5.0, every_s=120.0), "R25")


def killed_controller(options: ExperimentOptions) -> list[Finding]:
    """R25: Serve's controller is killed under load."""
    return _killed(options, options.items // 10, Fault(fault="kill_controller", at_s=5.0, every_s=120.0), "R25")


def _killed(options: ExperimentOptions, num_items: int, fault: Fault, goal_of_gap: str) -> list[Finding]:
    simulation = Simulation(REPLICAS, 1 / options.tokens_per_s, 4096)
    with simulated_server(simulation) as server:
        injector = FaultInjector(Address.of(server.url), server, simulation, options.seed)
        ledger, raw = asyncio.run(_run(server.url, num_items, injector, fault))
    return _findings(ledger, raw, injector.caused, goal_of_gap)


async def _run(url: str, num_items: int, injector: FaultInjector, fault: Fault) -> tuple[Ledger, list[Exchange]]:
    """Keep the ledger while the faults are caused and the raw clients send."""
    raw: list[Exchange] = []
    beside = [asyncio.create_task(injector.follow([fault])), asyncio.create_task(_send_raw(url, raw))]
    try:
        ledger = await keep_ledger(
            url, num_items, clients=CLIENTS, items_per_call=ITEMS_PER_CALL, item_bytes=ITEM_BYTES
        )
        await _until_answered_after_a_fault(injector, raw)
    finally:
        for task in beside:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
    return ledger, raw


async def _until_answered_after_a_fault(injector: FaultInjector, raw: Sequence[Exchange]) -> None:
    """Return when a raw request has been answered after the latest fault; a short run ends before the first one."""
    give_up_at = time.monotonic() + AFTERWARDS_S
    while time.monotonic() < give_up_at:
        if injector.caused and any(
            exchange.status == 200 and exchange.intended_s > injector.caused[-1].at_s for exchange in raw
        ):
            return
        await asyncio.sleep(0.5)


async def _send_raw(url: str, exchanges: list[Exchange]) -> None:
    """Send single items without repeating any, in phases of one second, until the task is cancelled."""
    executor = Executor(Address.of(url), give_up_s=60.0)
    planner = RequestPlanner(EqualItems(ITEM_BYTES, seed=12), timeout_ms=None, seed=0)
    phase = Phase("raw", 1.0, [ClosedStream("raw", RAW_CLIENTS)])
    loop = asyncio.get_running_loop()
    began = loop.time()
    while True:
        begin_s = loop.time() - began
        run = await executor.run(phase, [], planner)
        exchanges += [_shifted(exchange, begin_s) for exchange in run.exchanges]


def _shifted(exchange: Exchange, seconds: float) -> Exchange:
    """Return the exchange with times from the begin of the experiment."""
    return replace(
        exchange,
        intended_s=exchange.intended_s + seconds,
        sent_s=exchange.sent_s + seconds,
        done_s=exchange.done_s + seconds,
        content=b"",
    )


def _findings(
    ledger: Ledger, raw: Sequence[Exchange], caused: Sequence[CausedFault], goal_of_gap: str
) -> list[Finding]:
    refused = sum(exchange.status == OVERLOADED and exchange.has_retry_after for exchange in raw)
    failed = Counter(str(exchange.failure or exchange.status) for exchange in raw if exchange.status != 200)
    failed[str(OVERLOADED)] -= refused
    kills = sum("killed" in fault.detail for fault in caused)
    return [
        Finding("load", "items through the client", ledger.num_items),
        Finding("load", "items per second", ledger.num_items / ledger.seconds),
        at_least("load", "kills", kills, 1),
        at_most("R5", "items lost", ledger.lost, 0),
        at_most("R5", "items with a wrong reward", ledger.wrong, 0),
        at_most("R5", "items answered twice", ledger.duplicated, 0),
        at_most("R6", f"calls of the client that failed ({_listed(ledger.errors)})", ledger.errors.total(), 0),
        Finding("R6", "raw requests, repeated by nobody", len(raw)),
        Finding("R6", "of them refused with 503 and Retry-After", refused),
        at_most(
            "R6",
            f"of them failed otherwise ({_listed(failed)}), against those in flight",
            failed.total(),
            RAW_CLIENTS * kills,
        ),
        at_most("R6", "of them 4xx", sum(400 <= exchange.status < 500 for exchange in raw), 0),
        at_most(goal_of_gap, "longest time without a good raw answer, s", _longest_gap_s(raw), RESUMES_WITHIN_S),
    ]


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in (+counts).items()) or "none"


def _longest_gap_s(exchanges: Sequence[Exchange]) -> float:
    """Return the longest time between two answers with status 200."""
    times = sorted(exchange.done_s for exchange in exchanges if exchange.status == 200)
    return max((after - before for before, after in itertools.pairwise(times)), default=float("inf"))
