"""The scenarios of ``reward-loadtest``: which phases each one has.

Pure. An overload has two parts, since its steps are multiples of the capacity that its first phase measures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from loadtest.traffic.arrivals import Arrivals
from loadtest.traffic.phases import BurstStream, ClosedStream, OpenStream, Phase
from service.errors import StartupError

CAPACITY, RECOVERY = "capacity", "recovery"
RECOVERY_FACTOR = 0.8
SMALL, BULK = "small", "bulk"


class NoCapacityError(StartupError):
    """The measured capacity is zero, so there is nothing to take multiples of."""


class PhaseSource(Protocol):
    """What says which phases a test has."""

    def first_phases(self) -> Sequence[Phase]:
        """Return the phases that depend on no measurement."""
        ...

    def later_phases(self, items_per_s: float) -> Sequence[Phase]:
        """Return the phases that depend on the capacity that the first phase has measured."""
        ...


@dataclass(frozen=True, slots=True)
class FixedPhases:
    """Phases that all depend on no measurement."""

    phases: Sequence[Phase]

    def first_phases(self) -> Sequence[Phase]:
        """Return all phases."""
        return self.phases

    def later_phases(self, items_per_s: float) -> Sequence[Phase]:
        """Return none."""
        del items_per_s
        return ()


@dataclass(frozen=True, slots=True)
class Scenario:
    """What the options of the command ask for."""

    kind: str
    """``open``, ``closed``, ``ppo``, ``mixed`` or ``overload``."""

    duration_s: float
    rate_per_s: float = 10.0
    """Requests per second of the open stream."""

    shape: float = 1.0
    """Of the gaps between requests, as in `Arrivals`."""

    items_per_request: int = 1
    clients: int = 32
    """Of the closed stream, also of the one that measures the capacity."""

    batch_requests: int = 64
    """Of a PPO batch."""
    train_s: float = 1.0

    bulk_items: int = 64
    """Items of a request of the bulk client."""
    bulk_clients: int = 2

    factors: Sequence[float] = (0.5, 1.0, 2.0, 3.0, 5.0, 10.0)

    def first_phases(self) -> list[Phase]:
        """Return the phases that depend on no measurement."""
        return {
            "open": self._open,
            "closed": self._closed,
            "ppo": self._ppo,
            "mixed": self._mixed,
            "overload": self._capacity,
        }[self.kind]()

    def later_phases(self, items_per_s: float) -> list[Phase]:
        """Return the steps of an overload for a capacity; no phases in the other scenarios.

        The last one falls from the largest factor to 0.8 at once.

        Raises:
            NoCapacityError: the capacity is zero.
        """
        if self.kind != "overload":
            return []
        if items_per_s <= 0:
            raise NoCapacityError("No item of the first phase was answered, so there is no capacity to exceed.")

        def stream(name: str, factor: float, begin_s: float = 0.0) -> OpenStream:
            rate_per_s = factor * items_per_s / self.items_per_request
            return OpenStream(name, Arrivals(rate_per_s, self.shape), self.items_per_request, begin_s, factor)

        steps = [Phase(f"{factor:g}x", self.duration_s, [stream(f"{factor:g}x", factor)]) for factor in self.factors]
        largest = max(self.factors)
        fall = [stream(f"before, {largest:g}x", largest), stream(RECOVERY, RECOVERY_FACTOR, self.duration_s)]
        return [*steps, Phase(RECOVERY, self.duration_s, fall)]

    def _open(self) -> list[Phase]:
        stream = OpenStream("open", Arrivals(self.rate_per_s, self.shape), self.items_per_request)
        return [Phase("open", self.duration_s, [stream])]

    def _closed(self) -> list[Phase]:
        return [Phase("closed", self.duration_s, [ClosedStream("closed", self.clients, self.items_per_request)])]

    def _capacity(self) -> list[Phase]:
        return [Phase(CAPACITY, self.duration_s, [ClosedStream(CAPACITY, self.clients, self.items_per_request)])]

    def _ppo(self) -> list[Phase]:
        stream = BurstStream("ppo", self.batch_requests, self.items_per_request, self.train_s)
        return [Phase("ppo", self.duration_s, [stream])]

    def _mixed(self) -> list[Phase]:
        small = OpenStream(SMALL, Arrivals(self.rate_per_s, self.shape), self.items_per_request)
        bulk = ClosedStream(BULK, self.bulk_clients, self.bulk_items)
        return [
            Phase("small alone", self.duration_s, [small]),
            Phase("bulk alone", self.duration_s, [bulk]),
            Phase("both", self.duration_s, [small, bulk]),
        ]


def shape_of(arrivals: str, burstiness: float) -> float:
    """Return the shape of the gaps: of ``poisson``, ``constant``, or ``gamma`` with a squared coefficient of variation.

    Args:
        arrivals: name of the process.
        burstiness: of ``gamma``: variance of a gap over the square of its mean; 1 is Poisson, above it is burstier.
    """
    return {"poisson": 1.0, "constant": math.inf, "gamma": 1.0 / burstiness}[arrivals]
