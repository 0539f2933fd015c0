"""Figures of a server about itself: its metrics and its access log."""

from __future__ import annotations

import json
import math
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from loadtest.reliability.direct_requests import read
from loadtest.traffic.latencies import latencies_of


def total(url: str, sample: str, **labels: str) -> float:
    """Return the sum of a sample over all replicas and over all values of the labels that are not given."""
    return sum(
        one.value
        for family in text_string_to_metric_families(read(f"{url}/metrics"))
        for one in family.samples
        if one.name == sample and labels.items() <= one.labels.items()
    )


def p99_of_refusals_s(access_log: Path) -> float:
    """Return the 99th percentile of the seconds that the server spent on an answer with status 503; NaN without one."""
    with access_log.open(encoding="utf-8") as lines:
        answers = (json.loads(line) for line in lines)
        seconds = [one["total_s"] for one in answers if one["event"] == "answered" and one["status"] == 503]
    return latencies_of(seconds).quantiles["p99"] if seconds else math.nan
