"""What a new TCP connection for each single item costs, compared with persistent connections, at equal concurrency."""

from __future__ import annotations

import json
import statistics
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

from loadtest.console import report_console
from loadtest.generator import LoadRun, send_all
from loadtest.wire import OpenRlhfWire, UnexpectedAnswer
from loadtest.workload import WORKLOADS, cut_into_requests

WIRE = OpenRlhfWire()


@dataclass(frozen=True, slots=True)
class ConnectionPass:
    """All requests once, in one of the two ways."""

    round: int

    reuse: bool
    """Whether connections were persistent."""

    items_per_s: float
    latency_p50_s: float
    latency_p95_s: float

    client_cpu_s: float
    """CPU seconds of the generator."""

    server_cpu_s: float = 0.0
    """CPU seconds of the server, where the caller measures them."""


def run(options: Namespace) -> int:
    """Measure, print the table and write the file; returns the exit status, 1 where an item got no reward."""
    groups = WORKLOADS[options.workload].draw(options.requests, options.seed)
    bodies = [WIRE.body(request) for request in cut_into_requests(groups, 1, options.seed)][: options.requests]
    try:
        passes = list(measure(options.url, bodies, options.in_flight, options.rounds))
    except UnexpectedAnswer as error:
        print(f"python -m loadtest.connections: {error}.", file=sys.stderr)
        return 1
    _report(passes, options.in_flight)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(one) for one in passes], indent=1) + "\n", encoding="utf-8")
    return 0


def measure(
    url: str,
    bodies: Sequence[bytes],
    in_flight: int,
    rounds: int,
    server_cpu_s: Callable[[], float] = lambda: 0.0,
) -> Iterator[ConnectionPass]:
    """Yield the passes; which way is first alternates, and a pass that is not measured comes before all.

    Args:
        url: of the service.
        bodies: of the requests.
        in_flight: requests at once.
        rounds: passes of each way.
        server_cpu_s: returns the CPU seconds of the server so far.

    Raises:
        UnexpectedAnswer: a connection was refused or broke, or an item has no reward.
    """
    _send(url, bodies[:in_flight], in_flight, reuse=True)
    for number in range(rounds):
        for reuse in (True, False) if number % 2 == 0 else (False, True):
            before = server_cpu_s()
            load = _send(url, bodies, in_flight, reuse=reuse)
            yield ConnectionPass(
                round=number,
                reuse=reuse,
                items_per_s=len(load.rewards) / load.wall_s,
                latency_p50_s=load.latency_s(0.5),
                latency_p95_s=load.latency_s(0.95),
                client_cpu_s=load.cpu_s,
                server_cpu_s=server_cpu_s() - before,
            )


def throughput_ratio(passes: Sequence[ConnectionPass]) -> float:
    """The median throughput with new connections, divided by that with persistent ones."""
    rates = {way: [one.items_per_s for one in passes if one.reuse is way] for way in (True, False)}
    return statistics.median(rates[False]) / statistics.median(rates[True])


def cpu_ratio(passes: Sequence[ConnectionPass]) -> float:
    """The median CPU time of client and server with persistent connections, divided by that with new ones.

    That is the ratio of throughputs where the CPU is the limit. Other processes of the machine hardly change it.
    """
    times = {way: [one.client_cpu_s + one.server_cpu_s for one in passes if one.reuse is way] for way in (True, False)}
    return statistics.median(times[True]) / statistics.median(times[False])


def _send(url: str, bodies: Sequence[bytes], in_flight: int, *, reuse: bool) -> LoadRun:
    try:
        load = send_all(url, bodies, in_flight, WIRE, reuse=reuse)
    except (OSError, EOFError) as error:
        raise UnexpectedAnswer(f"A connection to {url} was refused or broke ({type(error).__name__})") from error
    _ = load.rewards  # raises where there is none
    return load


def _report(passes: Sequence[ConnectionPass], in_flight: int) -> None:
    table = Table(title=f"Single items, {in_flight} in flight")
    for heading in ("round", "connections", "items/s", "p50 ms", "p95 ms"):
        table.add_column(heading, justify="right")
    for one in passes:
        connections = "persistent" if one.reuse else "one per item"
        latencies = (f"{1000 * seconds:,.0f}" for seconds in (one.latency_p50_s, one.latency_p95_s))
        table.add_row(str(one.round + 1), connections, f"{one.items_per_s:,.0f}", *latencies)
    console = report_console()
    console.print(table)
    console.print(f"A new connection for each item: {throughput_ratio(passes):.0%} of the throughput (medians)")
