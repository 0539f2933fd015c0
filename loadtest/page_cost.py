"""What the page's Live view costs a server: the CPU time of its readings, as a share of the time between two.

CPU time, because a share of throughput this small is below the noise of one.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx2
import psutil

from service.arguments import CommandParser
from service.http.page_routes import FOLDER

PATHS = ("/metrics", "/v1/monitor")
"""What one reading asks for."""


@dataclass(frozen=True, slots=True)
class ReadingCost:
    """The cost of the Live view in one browser."""

    reading_s: float
    """CPU seconds of one reading."""

    interval_s: float
    """Seconds between two readings, which the page waits."""

    @property
    def share_of_core(self) -> float:
        """Share of one core."""
        return self.reading_s / self.interval_s


def interval_s() -> float:
    """Seconds between two readings, from the page's own script."""
    found = re.search(r"INTERVAL_MS = (\d+);", (FOLDER / "live.js").read_text(encoding="utf-8"))
    if found is None:
        raise ValueError("The script of the Live view names no interval.")
    return int(found[1]) / 1000


def measure(url: str, process_id: int, num_readings: int, headers: dict[str, str] | None = None) -> ReadingCost:
    """Read as the page does, one reading after the other, and compare with the same time without any.

    Args:
        url: of a server that nobody else asks for anything.
        process_id: of the server; its children count too.
        num_readings: the more, the finer; CPU time is counted in steps of 10 ms.
        headers: of the requests, for a key.

    Raises:
        httpx2.HTTPError: the server does not answer, or refuses.
    """
    with httpx2.Client(base_url=url, headers=headers, trust_env=False, timeout=60.0) as client:
        _read(client, 3)
        begin_s, busy_s = time.monotonic(), _cpu_s(process_id)
        _read(client, num_readings)
        elapsed_s, reading_s = time.monotonic() - begin_s, _cpu_s(process_id) - busy_s
        busy_s = _cpu_s(process_id)
        time.sleep(elapsed_s)
        idle_s = _cpu_s(process_id) - busy_s
    return ReadingCost(max(0.0, reading_s - idle_s) / num_readings, interval_s())


def _read(client: httpx2.Client, num_readings: int) -> None:
    for _ in range(num_readings):
        for path in PATHS:
            client.get(path).raise_for_status()


def _cpu_s(process_id: int) -> float:
    server = psutil.Process(process_id)
    times = [process.cpu_times() for process in (server, *server.children(recursive=True))]
    return sum(spent.user + spent.system for spent in times)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what the Live view costs; returns the exit status."""
    parser = CommandParser(
        prog="python -m loadtest.page_cost",
        description="Measure the CPU time that the page's Live view takes of an idle server.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("url", help="address of the server")
    parser.add_argument("process_id", type=int, help="its process")
    parser.add_argument("--readings", type=int, default=100, help="readings to measure")
    options = parser.parse(arguments)
    try:
        cost = measure(options.url, options.process_id, options.readings)
    except (httpx2.HTTPError, psutil.Error) as error:
        print(f"python -m loadtest.page_cost: {type(error).__name__}: {error}.", file=sys.stderr)
        return 1
    cores = os.cpu_count() or 1
    print(
        f"A reading takes {cost.reading_s * 1000:.0f} ms of CPU time. One every {cost.interval_s:g} s is "
        f"{cost.share_of_core:.2%} of a core, {cost.share_of_core / cores:.2%} of {cores} cores."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
