"""What a new TCP connection for each single item costs, compared with persistent connections, at equal concurrency."""

from __future__ import annotations

import json
import statistics
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

from loadtest.console import report_console
from loadtest.generator import send_all
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


def measure(url: str, bodies: Sequence[bytes], in_flight: int, rounds: int) -> Iterator[ConnectionPass]:
    """Yield the passes; which way is first alternates, and a pass that is not measured comes before all.

    Raises:
        UnexpectedAnswer: a connection was refused or broke, or an item has no reward.
    """
    _send(url, bodies[:in_flight], in_flight, reuse=True)
    for number in range(rounds):
        for reuse in (True, False) if number % 2 == 0 else (False, True):
            items_per_s, p50_s, p95_s = _send(url, bodies, in_flight, reuse=reuse)
            yield ConnectionPass(number, reuse, items_per_s, p50_s, p95_s)


def throughput_ratio(passes: Sequence[ConnectionPass]) -> float:
    """The median throughput with new connections, divided by that with persistent ones."""
    return _median_rate(passes, reuse=False) / _median_rate(passes, reuse=True)


def _median_rate(passes: Sequence[ConnectionPass], *, reuse: bool) -> float:
    return statistics.median(one.items_per_s for one in passes if one.reuse is reuse)


def _send(url: str, bodies: Sequence[bytes], in_flight: int, *, reuse: bool) -> tuple[float, float, float]:
    try:
        run = send_all(url, bodies, in_flight, WIRE, reuse=reuse)
    except (OSError, EOFError) as error:
        raise UnexpectedAnswer(f"A connection to {url} was refused or broke ({type(error).__name__})") from error
    return len(run.rewards) / run.wall_s, run.latency_s(0.5), run.latency_s(0.95)


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
