"""What a server that computes one item after the other would need under the same arrivals: a bound for comparison."""

from __future__ import annotations

import random
from collections.abc import Sequence

NUM_ITEMS = 100_000
"""Enough for the 99th percentile; takes a tenth of a second."""


def latencies_one_by_one(
    service_s: Sequence[float], rate_per_s: float, *, seed: int, num_items: int = NUM_ITEMS
) -> list[float]:
    """Return the latencies of an M/G/1 queue, first come, first served, by Lindley's recursion (1952).

    Args:
        service_s: measured seconds of one item each; drawn from with replacement.
        rate_per_s: of the Poisson process.
        seed: of arrivals and draws.
        num_items: of the result.

    Returns:
        Seconds from the arrival of each item to its end. Where ``rate_per_s`` times the mean of ``service_s`` is 1 or
        more they grow with the number of items.
    """
    rng = random.Random(seed)  # noqa: S311 - times, not secrets
    latencies, free_in_s = [], 0.0
    for _ in range(num_items):
        free_in_s = max(0.0, free_in_s - rng.expovariate(rate_per_s)) + rng.choice(service_s)
        latencies.append(free_in_s)
    return latencies
