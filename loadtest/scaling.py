"""Simulates many replicas on one machine: throughput, latency and CPU time from one replica to many.

``python -m loadtest.scaling --replicas 1 2 4 8 16 --json docs/scaling.json --plot docs/images/scaling.png``

The forward pass is a sleep of a given time per token (`loadtest.simulated_app`); everything else is real. So the curve
shows where the service itself, and not a model, becomes the bottleneck on this machine. Every reward is checked.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from reward_client.errors import RewardServiceError
from rich.table import Table

from loadtest.console import report_console
from loadtest.generator import LoadRun, send_all
from loadtest.scaling_plot import draw
from loadtest.simulated_server import SimulatedServer, Simulation, simulated_server
from loadtest.wire import NATIVE
from service.engines.oracle import oracle_reward_of_text

ITEM_BYTES = 128
"""Tokens of an item: the oracle's tokens are bytes."""
PROMPT_BYTES = 40
GROUP_SIZE = 8
BULK_ITEMS = 1024
LOAD_S = 5.0
"""Seconds for which each measurement keeps all replicas busy, if they were the only limit."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How items are sent."""

    name: str
    items_per_request: int
    connections_per_replica: int

    def connections(self, replicas: int) -> int:
        """Connections that keep so many replicas busy; a bulk request keeps all of them busy by itself."""
        return max(1, self.connections_per_replica * replicas)


SHAPES = (Shape("singles", 1, 24), Shape("groups of 8", GROUP_SIZE, 6), Shape("bulk of 1,024", BULK_ITEMS, 0))


@dataclass(frozen=True, slots=True)
class Measurement:
    """One shape with one number of replicas."""

    shape: str
    replicas: int
    items_per_s: float

    ideal_items_per_s: float
    """What the simulated forward passes alone would allow."""

    p50_s: float
    p99_s: float

    cpu_cores: dict[str, float]
    """Mean cores in use by part: ``replicas``, ``proxy``, ``ray`` and ``client``."""

    cpu_ms_per_request: dict[str, float]
    """CPU milliseconds of a request, by part."""

    load_average: float
    """Of the machine over one minute, the simulation included; above the number of cores others wanted them too."""


def items_of(number: int, num_items: int) -> list[dict[str, str]]:
    """Return the items of a request: groups with a prompt of their own, every text unique and of `ITEM_BYTES`."""
    items = []
    for index in range(num_items):
        prompt = f"request {number} group {index // GROUP_SIZE}? ".ljust(PROMPT_BYTES)
        items.append({"prompt": prompt, "completion": f"answer {index} ".ljust(ITEM_BYTES - PROMPT_BYTES, "x")})
    return items


def measure(
    server: SimulatedServer, shape: Shape, replicas: int, tokens_per_s: float, numbers: Iterable[int]
) -> Measurement:
    """Send about `LOAD_S` seconds of work and return what was seen.

    Raises:
        UnexpectedAnswer: a request failed.
        RewardServiceError: a reward is wrong.
    """
    ideal = replicas * tokens_per_s / ITEM_BYTES
    num_requests = max(
        3 if shape.items_per_request == BULK_ITEMS else 50, int(ideal * LOAD_S / shape.items_per_request)
    )
    requests = [items_of(number, shape.items_per_request) for number in itertools.islice(numbers, num_requests)]
    bodies = [NATIVE.body(items) for items in requests]
    before = server.cpu_s()
    run = send_all(server.url, bodies, shape.connections(replicas))
    after = server.cpu_s()
    check(run, requests)
    spent = {part: after[part] - before.get(part, 0.0) for part in ("replicas", "proxy", "ray")} | {"client": run.cpu_s}
    return Measurement(
        shape.name,
        replicas,
        num_requests * shape.items_per_request / run.wall_s,
        ideal,
        run.latency_s(0.5),
        run.latency_s(0.99),
        {part: seconds / run.wall_s for part, seconds in spent.items()},
        {part: 1000 * seconds / num_requests for part, seconds in spent.items()},
        os.getloadavg()[0],
    )


def check(run: LoadRun, requests: Sequence[Sequence[dict[str, str]]]) -> None:
    """Compare every reward with the one that the text must have.

    Raises:
        RewardServiceError: some reward is of another text.
    """
    expected = [oracle_reward_of_text(item["prompt"], item["completion"]) for items in requests for item in items]
    if run.rewards != expected:
        raise RewardServiceError("Some rewards are not those of their items, so the figures mean nothing.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    measurements: list[Measurement] = []
    numbers = itertools.count()
    console = report_console()
    for replicas in options.replicas:
        with simulated_server(Simulation(replicas, 1 / options.tokens_per_s, options.max_batch_tokens)) as server:
            send_all(server.url, [NATIVE.body(items_of(next(numbers), 1)) for _ in range(50 * replicas)], 8)
            for shape in SHAPES:
                measurements.append(measure(server, shape, replicas, options.tokens_per_s, numbers))
                console.print(table(measurements[-1:]))
        save(measurements, options)  # what was measured is kept where a larger number of replicas does not start
    console.print(table(measurements))
    return 0


def save(measurements: Sequence[Measurement], options: argparse.Namespace) -> None:
    """Write the figures and the plot to the files that were asked for."""
    report = {
        "tokens_per_s_of_a_replica": options.tokens_per_s,
        "tokens_of_an_item": ITEM_BYTES,
        "cores": len(os.sched_getaffinity(0)),
        "measurements": [asdict(measurement) for measurement in measurements],
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        draw(measurements, options.plot)


def table(measurements: Sequence[Measurement]) -> Table:
    """Return the figures as a table."""
    columns = (
        "shape",
        "replicas",
        "items/s",
        "of ideal",
        "p50 ms",
        "p99 ms",
        "cores: replicas",
        "proxy",
        "ray",
        "client",
    )
    result = Table(*columns)
    for row in measurements:
        cores = [f"{row.cpu_cores[part]:.2f}" for part in ("replicas", "proxy", "ray", "client")]
        result.add_row(
            row.shape,
            str(row.replicas),
            f"{row.items_per_s:,.0f}",
            f"{row.items_per_s / row.ideal_items_per_s:.0%}",
            f"{1000 * row.p50_s:.0f}",
            f"{1000 * row.p99_s:.0f}",
            *cores,
        )
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.scaling", description=__doc__)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="numbers of replicas")
    parser.add_argument("--tokens-per-s", type=float, default=20_000.0, help="of each replica's simulated forward pass")
    parser.add_argument("--max-batch-tokens", type=int, default=1024, help="tokens of a simulated forward pass")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--plot", type=Path, help="PNG file for the plot")
    return parser


if __name__ == "__main__":
    sys.exit(main())
