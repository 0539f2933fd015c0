"""Callers that go away: their waiting items are not computed, and later requests are as fast as before."""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from dataclasses import dataclass

from loadtest.connection import Address, Connection
from loadtest.reliability.findings import Finding, at_least, at_most
from loadtest.reliability.options import ExperimentOptions
from loadtest.reliability.served_metrics import total
from loadtest.simulated_server import Simulation, simulated_server
from loadtest.traffic.items import EqualItems
from loadtest.traffic.phases import ClosedStream, RequestPlanner
from loadtest.wire import NATIVE

ITEM_BYTES = 512
AT_ONCE = 200
PROBES = 20
BACK_WITHIN_S = 10.0
GIVE_UP_S = 60.0


def cancellations(options: ExperimentOptions) -> list[Finding]:
    """R18: a tenth of ``items`` requests whose callers close their connections while they wait."""
    num_cancelled = max(AT_ONCE, options.items // 10)
    with simulated_server(Simulation(1, 1 / options.tokens_per_s, 1024), options.runtime) as server:
        probes, cancelled_s = asyncio.run(_cancel(Address.of(server.url), num_cancelled))
        scored = total(server.url, "rm_items_total", outcome="ok")
    before_s, after_s = probes.before_s, probes.after_s
    computed = scored - 2 * PROBES - 1
    return [
        Finding("load", "requests whose caller left", num_cancelled),
        at_least("R18", "share of their items that were not computed", 1 - computed / num_cancelled, 0.95),
        at_most("R18", "seconds from the last of them to a good answer", probes.first_s, BACK_WITHIN_S),
        at_most("R18", "median latency afterwards over that before", after_s / before_s, 1.5),
        Finding("load", "seconds of the cancellations", cancelled_s),
    ]


@dataclass(frozen=True, slots=True)
class Probes:
    """Requests that wait for their answers, before and after the others."""

    before_s: float
    """Median latency before."""
    first_s: float
    """From the last cancellation to the first good answer."""
    after_s: float
    """Median latency after that."""


async def _cancel(address: Address, num_cancelled: int) -> tuple[Probes, float]:
    """Return the latencies of the probes, and the seconds of the cancellations."""
    planner = RequestPlanner(EqualItems(ITEM_BYTES, seed=21), timeout_ms=None, seed=0)
    stream = ClosedStream("gone", 1)
    before_s = await _probe(address, planner, stream, PROBES)
    began = time.monotonic()
    for _ in range(0, num_cancelled, AT_ONCE):
        await asyncio.gather(*(_send_and_leave(address, planner.request(stream).body) for _ in range(AT_ONCE)))
    ended = time.monotonic()
    while math.isinf(await _probe(address, planner, stream, 1)):
        if time.monotonic() > ended + GIVE_UP_S:
            return Probes(before_s, math.inf, math.inf), ended - began
        await asyncio.sleep(0.1)
    first_s = time.monotonic() - ended
    return Probes(before_s, first_s, await _probe(address, planner, stream, PROBES)), ended - began


async def _send_and_leave(address: Address, body: bytes) -> None:
    _, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(address.post(NATIVE.path, body))
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.close()


async def _probe(address: Address, planner: RequestPlanner, stream: ClosedStream, count: int) -> float:
    """Return the median latency of requests, one after the other; infinite where none is answered with 200."""
    connection = Connection(address)
    latencies = []
    for _ in range(count):
        began = time.monotonic()
        response = await connection.send(address.post(NATIVE.path, planner.request(stream).body))
        if response.status == 200:
            latencies.append(time.monotonic() - began)
    connection.close()
    return statistics.median(latencies) if latencies else math.inf
