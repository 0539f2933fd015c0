"""Asks a Prometheus server: a query over a span of time, as numbers.

The one module here that speaks HTTP. What Prometheus says about a query that it cannot evaluate is the error's message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx2
import numpy as np
from numpy.typing import NDArray

TIMEOUT_S = 30.0


class QueryError(Exception):
    """Prometheus refused a query or did not answer."""


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """One series of an answer: its labels, seconds since 1970 [n] and values [n], NaN included."""

    labels: dict[str, str]
    times: NDArray[np.float64]
    values: NDArray[np.float64]

    @property
    def is_silent(self) -> bool:
        """Whether there is no number in it."""
        return not np.isfinite(self.values).any()


@dataclass(frozen=True, slots=True)
class Span:
    """A span of time. ``start``, ``end``: seconds since 1970; ``step_s``: seconds between two points."""

    start: float
    end: float
    step_s: float


def query_range(url: str, expr: str, span: Span) -> list[Series]:
    """Evaluate a query at every step of a span.

    Raises:
        QueryError: the query is wrong, or the server does not answer.
    """
    asked = {"query": expr, "start": f"{span.start:.3f}", "end": f"{span.end:.3f}", "step": f"{span.step_s:g}"}
    try:
        answer = httpx2.post(f"{url}/api/v1/query_range", data=asked, timeout=TIMEOUT_S)
    except httpx2.HTTPError as error:
        raise QueryError(f"Prometheus at {url} does not answer: {type(error).__name__}.") from error
    body: dict[str, Any] = answer.json()
    if body["status"] != "success":
        raise QueryError(f"{body['error']}: {expr}")
    return [_series(found) for found in body["data"]["result"]]


def _series(found: dict[str, Any]) -> Series:
    points = np.array([[float(time), float(value)] for time, value in found["values"]], np.float64)
    return Series(found["metric"], points[:, 0], points[:, 1])
