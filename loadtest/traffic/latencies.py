"""Latencies in high dynamic range histograms: a relative error of 0.1 percent from 1 microsecond to an hour."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hdrh.histogram import HdrHistogram

LONGEST_S = 3600.0
SIGNIFICANT_FIGURES = 3
QUANTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p99.9": 99.9}


@dataclass(frozen=True, slots=True)
class Latencies:
    """Quantiles in seconds; NaN without a value."""

    count: int
    quantiles: dict[str, float]
    max: float

    histogram: str
    """All values in HdrHistogram's compressed format (V2, base64), which its tools in other languages read."""


def histogram_of(seconds: Iterable[float]) -> HdrHistogram:
    """Record durations; those above an hour count as an hour."""
    histogram = HdrHistogram(1, int(LONGEST_S * 1e6), SIGNIFICANT_FIGURES)
    for value in seconds:
        histogram.record_value(max(1, min(round(value * 1e6), int(LONGEST_S * 1e6))))
    return histogram


def latencies_of(seconds: Iterable[float]) -> Latencies:
    """Summarize durations in seconds."""
    histogram = histogram_of(seconds)
    count = int(histogram.get_total_count())

    def at(percentile: float) -> float:
        return histogram.get_value_at_percentile(percentile) / 1e6 if count else math.nan

    return Latencies(
        count,
        {name: at(percentile) for name, percentile in QUANTILES.items()},
        at(100.0),
        str(histogram.encode().decode()),
    )


def curve_of(encoded: str) -> tuple[list[float], list[float]]:
    """Return percentiles below 100 and the latencies in seconds at them, dense near 100, for a plot."""
    histogram: Any = HdrHistogram.decode(encoded.encode())
    percentiles = [100.0 * (1 - 10 ** (-step / 12)) for step in range(60)]
    reached = 100.0 * (1 - 1 / max(1, int(histogram.get_total_count())))
    shown = [percentile for percentile in percentiles if percentile <= reached] or [0.0]
    return shown, [histogram.get_value_at_percentile(percentile) / 1e6 for percentile in shown]
