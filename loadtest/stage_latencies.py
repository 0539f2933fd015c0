"""Latencies by stage: what the service reports of each request, and the rest that a client waits.

It computes and prints; nothing is measured here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.table import Table

FORWARD = "forward pass alone"
"""The pass of one item in a process without a server."""

BEYOND = "client less forward pass alone"
"""How much longer the client waits for an item than its forward pass alone takes."""

TOTAL = "total"
"""The service's stage that contains all others."""

OUTSIDE, CLIENT = "outside the service", "client"
"""What the client waits beyond the service's total: sockets, the proxy and Ray; and all that it waits."""

ONE_BY_ONE = "items one by one, simulated"
"""Under load, what a server would need that has the same arrivals and computes nothing but one forward pass after the
other."""

QUANTILES = (0.5, 0.99)


@dataclass(frozen=True, slots=True)
class StageLatencies:
    """Seconds of each request under one load, by stage."""

    load: str
    """The load in a few words."""

    seconds: Mapping[str, Sequence[float]] = field(repr=False)
    """By stage; the service's stages in its own order."""

    rate_per_s: float | None = None
    """Mean requests per second that were sent; None: each after the answer to the one before."""

    num_failed: int = 0
    """Requests without a reward, which are left out."""

    def beside(self, stage: str, seconds: Sequence[float]) -> StageLatencies:
        """Return these latencies with one more stage."""
        return replace(self, seconds={**self.seconds, stage: seconds})

    @property
    def num_requests(self) -> int:
        """Requests that were answered."""
        return len(next(iter(self.seconds.values()), ()))

    def quantile_ms(self, stage: str, share: float) -> float:
        """Return a quantile of a stage in milliseconds (nearest rank); NaN where nothing was measured."""
        ordered = sorted(self.seconds.get(stage, ()))
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)] * 1e3 if ordered else math.nan

    def as_json(self) -> dict[str, Any]:
        """Return the quantiles JSON-ready."""
        return {
            "load": self.load,
            "rate_per_s": self.rate_per_s,
            "num_requests": self.num_requests,
            "num_failed": self.num_failed,
            "stages_ms": {
                stage: {f"p{share * 100:g}": self.quantile_ms(stage, share) for share in QUANTILES}
                for stage in self.seconds
            },
        }


def stage_latencies(
    load: str, answers: Iterable[tuple[bytes, float]], rate_per_s: float | None = None, num_failed: int = 0
) -> StageLatencies:
    """Return the latencies of answered requests by stage.

    Args:
        load: in a few words.
        answers: the body of each answer of ``/v1/score``, and the seconds that its client waited.
        rate_per_s: mean requests per second, where they were sent at times of their own.
        num_failed: requests without a reward, which are not among the answers.
    """
    seconds: dict[str, list[float]] = {}
    for content, client_s in answers:
        stages = {stage: ms / 1e3 for stage, ms in json.loads(content)["timings_ms"].items()}
        for stage, value in (stages | {OUTSIDE: client_s - stages[TOTAL], CLIENT: client_s}).items():
            seconds.setdefault(stage, []).append(value)
    return StageLatencies(load, seconds, rate_per_s, num_failed)


def stage_table(title: str, loads: Sequence[StageLatencies]) -> Table:
    """Return a table with a row per stage and two columns per load, in milliseconds."""
    table = Table("stage", *(f"{one.load}: p{share * 100:g} ms" for one in loads for share in QUANTILES), title=title)
    for stage in dict.fromkeys(stage for one in loads for stage in one.seconds):
        table.add_row(stage, *(cell for one in loads for cell in _cells(one, stage)))
    return table


def _cells(latencies: StageLatencies, stage: str) -> list[str]:
    if stage not in latencies.seconds:
        return [""] * len(QUANTILES)
    return [f"{latencies.quantile_ms(stage, share):.2f}" for share in QUANTILES]
