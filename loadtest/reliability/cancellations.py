"""Callers that go away: their waiting items are not computed, and later requests are as fast as before."""

from __future__ import annotations

import asyncio
import statistics
import time

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


def cancellations(options: ExperimentOptions) -> list[Finding]:
    """R18: a tenth of ``items`` requests whose callers close their connections while they wait."""
    num_cancelled = max(AT_ONCE, options.items // 10)
    with simulated_server(Simulation(1, 1 / options.tokens_per_s, 1024), options.runtime) as server:
        before_s, cancelled_s, after_s = asyncio.run(_cancel(Address.of(server.url), num_cancelled))
        scored = total(server.url, "rm_items_total", outcome="ok")
    computed = scored - 2 * PROBES
    return [
        Finding("load", "requests whose caller left", num_cancelled),
        at_least("R18", "share of their items that were not computed", 1 - computed / num_cancelled, 0.95),
        at_most("R18", "median latency afterwards over that before", after_s / before_s, 1.5),
        Finding("load", "seconds of the cancellations", cancelled_s),
    ]


async def _cancel(address: Address, num_cancelled: int) -> tuple[float, float, float]:
    """Return the median latency before, the seconds of the cancellations, and the median latency after."""
    planner = RequestPlanner(EqualItems(ITEM_BYTES, seed=21), timeout_ms=None, seed=0)
    stream = ClosedStream("gone", 1)
    before_s = await _probe(address, planner, stream)
    began = time.monotonic()
    for _ in range(0, num_cancelled, AT_ONCE):
        await asyncio.gather(*(_send_and_leave(address, planner.request(stream).body) for _ in range(AT_ONCE)))
    cancelled_s = time.monotonic() - began
    await asyncio.sleep(1.0)
    return before_s, cancelled_s, await _probe(address, planner, stream)


async def _send_and_leave(address: Address, body: bytes) -> None:
    _, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(address.post(NATIVE.path, body))
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.close()


async def _probe(address: Address, planner: RequestPlanner, stream: ClosedStream) -> float:
    connection = Connection(address)
    latencies = []
    for _ in range(PROBES):
        began = time.monotonic()
        response = await connection.send(address.post(NATIVE.path, planner.request(stream).body))
        if response.status == 200:
            latencies.append(time.monotonic() - began)
    connection.close()
    return statistics.median(latencies) if latencies else float("inf")
