"""Memory of a replica over many items, and of a replica that leaks on purpose, which the measurement must find."""

from __future__ import annotations

import asyncio

from rich.console import Console

from loadtest.reliability.findings import Finding, at_least, at_most
from loadtest.reliability.ledger import keep_ledger
from loadtest.reliability.options import ExperimentOptions
from loadtest.run_progress import RunProgress
from loadtest.simulated_server import SimulatedServer, Simulation, simulated_server

WARM_UP_SHARE = 0.25
"""Of the items, before the first measurement: caches, histograms and arenas of the allocator fill."""
SAMPLES = 12
LEAKED_BYTES = 64
"""Of the control, for each sequence: 64 MB for a million items, the smallest leak that must be found being 1 MB."""
CONTROL_SHARE = 0.1
"""Of the items, for the control: a leak that has to be found shows in fewer items than one that has to be excluded."""
CLIENTS = 16
ITEMS_PER_CALL = 64
ITEM_BYTES = 128
MEBIBYTE = 2**20


def memory_growth(options: ExperimentOptions) -> list[Finding]:
    """R15: slope of the resident memory of a replica, and of a replica with a leak of 64 bytes an item."""
    with RunProgress(Console(stderr=True)) as progress:
        honest = _slope_mb(options, options.items, 0, progress)
        leaking = _slope_mb(options, int(options.items * CONTROL_SHARE), LEAKED_BYTES, progress)
    return [
        Finding("load", "items after the warm-up, a tenth of it with the leak", options.items),
        at_most("R15", "growth of resident memory, MB per million items", honest, 1.0),
        at_least("R15", "the same with a leak of 64 bytes an item", leaking, 0.5 * LEAKED_BYTES),
    ]


def _slope_mb(options: ExperimentOptions, num_items: int, leaked_bytes: int, progress: RunProgress) -> float:
    """Return the slope in MB per million items after the warm-up, by least squares over the samples."""
    simulation = Simulation(1, 0.0, 65_536, oracle={"leaked_bytes": leaked_bytes})
    title = "memory of a replica that leaks" if leaked_bytes else "memory of a replica"
    progress.tell(f"{title}, start")
    with simulated_server(simulation, options.runtime) as server:
        progress.tell(f"{title}, warm-up")
        asyncio.run(_score(server, int(num_items * WARM_UP_SHARE)))
        samples = [(0, resident_mb(server))]
        step = max(1, num_items // SAMPLES)
        for number in range(1, SAMPLES + 1):
            progress.tell(f"{title}, {samples[-1][1]:,.1f} MiB", number - 1, SAMPLES)
            asyncio.run(_score(server, step))
            samples.append((number * step, resident_mb(server)))
    return 1e6 * slope_of(samples)


def slope_of(samples: list[tuple[int, float]]) -> float:
    """Return the slope of a line through points, by least squares."""
    mean_x = sum(x for x, _ in samples) / len(samples)
    mean_y = sum(y for _, y in samples) / len(samples)
    spread = sum((x - mean_x) ** 2 for x, _ in samples)
    return sum((x - mean_x) * (y - mean_y) for x, y in samples) / spread


async def _score(server: SimulatedServer, num_items: int) -> None:
    await keep_ledger(
        server.url,
        num_items,
        clients=CLIENTS,
        items_per_call=ITEMS_PER_CALL,
        item_bytes=ITEM_BYTES,
        console=Console(quiet=True),
    )


def resident_mb(server: SimulatedServer) -> float:
    """Return the resident memory of all replicas, in MiB."""
    return sum(float(process.memory_info().rss) for process in server.processes("replica")) / MEBIBYTE
