"""How much faster than a plain server: same checkpoint, same cores, same work, each in its turn.

It decides what is measured and says what was found; servers, work and sending have modules of their own.

    python -m loadtest.compare [--model FOLDER] [--cores 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from loadtest.generator import LoadRun, UnexpectedAnswer, send_all
from loadtest.random_checkpoint import write_random_checkpoint
from loadtest.servers import RunningServer, running_baseline, running_service
from loadtest.workload import draw_groups, request_bodies
from service.errors import StartupError

GROUP_SIZE = 8


@dataclass(frozen=True, slots=True)
class LoadShape:
    """How one round's groups of completions are sent."""

    name: str
    num_groups: int
    items_per_request: int
    num_connections: int
    is_shuffled: bool = False

    @property
    def title(self) -> str:
        """The shape in a few words."""
        order = ", shuffled" if self.is_shuffled else ""
        if self.num_connections == 1:
            return f"1 request, {self.num_groups} groups of {GROUP_SIZE}{order}"
        return f"single items, {self.num_connections} connections{order}"

    def bodies(self, seed: int) -> list[bytes]:
        """The requests of one round."""
        groups = draw_groups(self.num_groups, GROUP_SIZE, seed)
        return request_bodies(groups, self.items_per_request, seed if self.is_shuffled else None)


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one server did with one round of one shape.

    ``server_cpu``, ``client_cpu`` and ``idle_cpu``: cores used meanwhile by this server, by the generator and by the
    other, idle server. A server that got fewer cores than there are was disturbed.
    """

    server: str
    shape: str
    round: int
    items_per_s: float
    latency_p50_s: float
    latency_p95_s: float
    server_cpu: float
    client_cpu: float
    idle_cpu: float
    rewards: list[float] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Whether both servers gave the same rewards.

    ``max_difference``: largest absolute one. ``spread``: standard deviation of the plain server's rewards, without
    which the difference says nothing. ``spearman``: rank correlation.
    """

    num_items: int
    max_difference: float
    spread: float
    spearman: float

    def holds(self, dtype: str) -> bool:
        """Whether the differences are those of rounding: in 16 bits both servers round, each in its own order."""
        if dtype == "float32":
            return self.spearman >= 0.9999 and self.max_difference <= 1e-4 * max(1.0, self.spread)
        return self.spearman >= 0.995 and self.max_difference <= 0.2 * self.spread


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 1 when a server does not start or the rewards disagree."""
    options = _parser().parse_args(arguments)
    console = Console()
    signal.signal(signal.SIGTERM, _end_like_ctrl_c)
    if options.cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    shapes = [
        LoadShape("single", num_groups=options.single_groups, items_per_request=1, num_connections=32),
        LoadShape("bulk", options.bulk_groups, items_per_request=options.bulk_groups * GROUP_SIZE, num_connections=1),
    ]
    shapes.append(replace(shapes[-1], name="bulk shuffled", is_shuffled=True))
    try:
        found = _measure(options, shapes, console)
    except (StartupError, UnexpectedAnswer, OSError, EOFError) as error:
        console.print(f"loadtest.compare: {type(error).__name__}: {error}", markup=False, style="red")
        return 1
    except KeyboardInterrupt:
        return 130
    agreement = compare_rewards(found)
    agrees = agreement.holds(options.dtype)
    _print(console, shapes, found, agreement, agrees=agrees)
    if options.json is not None:
        report = _report(options, shapes, found, agreement, agrees=agrees)
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if agrees else 1


def compare_rewards(found: Sequence[Measurement]) -> Agreement:
    """Return how well the rewards of both servers agree, over all rounds and shapes."""
    plain, ours = (
        np.array([reward for one in found if one.server == server for reward in one.rewards])
        for server in ("plain", "ours")
    )
    return Agreement(
        num_items=len(plain),
        max_difference=float(np.abs(plain - ours).max()),
        spread=float(plain.std()),
        spearman=float(np.corrcoef(ranks(plain), ranks(ours))[0, 1]),
    )


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value, float64 [n] from 1; equal values share the mean of their ranks."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def ratios(found: Sequence[Measurement], shape: str) -> list[float]:
    """Return our items per second over those of the plain server, per round."""
    by_server = {
        server: {one.round: one.items_per_s for one in found if one.shape == shape and one.server == server}
        for server in ("plain", "ours")
    }
    return [by_server["ours"][round_] / plain for round_, plain in sorted(by_server["plain"].items())]


def _measure(options: argparse.Namespace, shapes: Sequence[LoadShape], console: Console) -> list[Measurement]:
    with tempfile.TemporaryDirectory(prefix="reward-compare-") as folder, Progress(console=console) as progress:
        steps = progress.add_task("Starting the servers", total=2 + 2 * len(shapes) * options.rounds)
        model = options.model or write_random_checkpoint(Path(folder) / "random-24m", dtype=options.dtype)
        with (
            running_baseline(model, options.dtype, Path(folder)) as plain,
            running_service(model, options.dtype, Path(folder)) as ours,
        ):
            warm_up = request_bodies(draw_groups(4, GROUP_SIZE, seed=options.seed - 1), items_per_request=1)
            for server in (plain, ours):
                progress.update(steps, description=f"Warming up {server.name}")
                _ = send_all(server.url, warm_up, num_connections=16).rewards
                progress.advance(steps)
            found = []
            for shape, round_, server, idle in _turns(shapes, options.rounds, plain, ours):
                progress.update(steps, description=f"Round {round_ + 1}: {shape.name}, {server.name}")
                found.append(_measure_one(shape, round_, server, idle, shape.bodies(options.seed + round_)))
                progress.advance(steps)
    return found


def _turns(
    shapes: Sequence[LoadShape], rounds: int, plain: RunningServer, ours: RunningServer
) -> Iterator[tuple[LoadShape, int, RunningServer, RunningServer]]:
    """Who is measured when, and who is idle meanwhile; they take turns in going first, for noise comes in waves."""
    for round_ in range(rounds):
        first, second = (plain, ours) if round_ % 2 == 0 else (ours, plain)
        for shape in shapes:
            yield shape, round_, first, second
            yield shape, round_, second, first


def _measure_one(
    shape: LoadShape, round_: int, server: RunningServer, idle: RunningServer, bodies: Sequence[bytes]
) -> Measurement:
    server_before, idle_before = server.cpu_s(), idle.cpu_s()
    run: LoadRun = send_all(server.url, bodies, shape.num_connections)
    rewards = run.rewards
    return Measurement(
        server=server.name,
        shape=shape.name,
        round=round_,
        items_per_s=len(rewards) / run.wall_s,
        latency_p50_s=run.latency_s(0.5),
        latency_p95_s=run.latency_s(0.95),
        server_cpu=(server.cpu_s() - server_before) / run.wall_s,
        client_cpu=run.cpu_s / run.wall_s,
        idle_cpu=(idle.cpu_s() - idle_before) / run.wall_s,
        rewards=rewards,
    )


def _print(
    console: Console,
    shapes: Sequence[LoadShape],
    found: Sequence[Measurement],
    agreement: Agreement,
    *,
    agrees: bool,
) -> None:
    table = Table("work", "server", "items/s", "p50 s", "p95 s", "cores", "ratio (each round)")
    for shape in shapes:
        per_round = ratios(found, shape.name)
        said = f"{statistics.median(per_round):.2f} ({', '.join(f'{ratio:.2f}' for ratio in per_round)})"
        for server in ("plain", "ours"):
            mine = [one for one in found if (one.shape, one.server) == (shape.name, server)]
            medians = [
                statistics.median(getattr(one, name) for one in mine)
                for name in ("items_per_s", "latency_p50_s", "latency_p95_s", "server_cpu")
            ]
            title = shape.title if server == "plain" else ""
            table.add_row(title, server, *(f"{median:.2f}" for median in medians), said if server == "ours" else "")
    console.print(table)
    console.print(
        f"Meanwhile the generator used at most {max(one.client_cpu for one in found):.2f} cores, "
        f"the idle server at most {max(one.idle_cpu for one in found):.2f}."
    )
    console.print(
        f"Rewards {'agree' if agrees else 'DISAGREE'} on {agreement.num_items} items: largest difference "
        f"{agreement.max_difference:.2g} (their spread is {agreement.spread:.2g}), Spearman {agreement.spearman:.5f}",
        style=None if agrees else "red",
    )


def _report(
    options: argparse.Namespace,
    shapes: Sequence[LoadShape],
    found: Sequence[Measurement],
    agreement: Agreement,
    *,
    agrees: bool,
) -> dict[str, object]:
    return {
        "model": str(options.model) if options.model else "random, 24 million parameters",
        "dtype": options.dtype,
        "seed": options.seed,
        "cores": len(os.sched_getaffinity(0)),
        "shapes": [
            asdict(shape) | {"ratios": ratios(found, shape.name), "ratio": statistics.median(ratios(found, shape.name))}
            for shape in shapes
        ],
        "measurements": [{name: value for name, value in asdict(one).items() if name != "rewards"} for one in found],
        "agreement": asdict(agreement) | {"agrees": agrees},
    }


def _end_like_ctrl_c(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.compare", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="checkpoint folder; none: a random one of 24 M weights"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds (default: %(default)s)")
    parser.add_argument("--single-groups", type=int, default=16, help="groups of 8 sent as single items, each round")
    parser.add_argument("--bulk-groups", type=int, default=16, help="groups of 8 in the one bulk request, each round")
    parser.add_argument("--cores", type=int, help="use only so many cores, for both servers and the generator together")
    parser.add_argument("--seed", type=int, default=1, help="of the texts (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    return parser


if __name__ == "__main__":
    sys.exit(main())
