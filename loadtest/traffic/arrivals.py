"""When the requests of an open loop start: renewal processes with gamma-distributed gaps, computed in advance.

Pure and seeded. A gap has the mean 1 / rate and the shape k: k = 1 is a Poisson process, k < 1 is burstier (the squared
coefficient of variation of the gaps is 1 / k), and an infinite k means equal gaps.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

POISSON = 1.0
CONSTANT = math.inf


@dataclass(frozen=True, slots=True)
class Arrivals:
    """An arrival process."""

    rate_per_s: float
    """Mean number of requests per second."""

    shape: float = POISSON
    """k of the gamma distribution."""

    def times(self, duration_s: float, seed: int) -> list[float]:
        """Return the start of each request in seconds from the begin, ascending, each below ``duration_s``."""
        random_ = random.Random(seed)  # noqa: S311 - a schedule, not a secret
        starts: list[float] = []
        now = self._gap(random_)
        while now < duration_s:
            starts.append(now)
            now += self._gap(random_)
        return starts

    def _gap(self, random_: random.Random) -> float:
        if math.isinf(self.shape):
            return 1.0 / self.rate_per_s
        return random_.gammavariate(self.shape, 1.0 / (self.shape * self.rate_per_s))
