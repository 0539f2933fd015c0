"""Client of the Prometheus HTTP API: evaluates a query over a time range and returns numbers.

The only module of ``monitoring`` that uses HTTP. When Prometheus cannot evaluate a query, its message is the error's.
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
    """One series of a result."""

    labels: dict[str, str]

    times: NDArray[np.float64]
    """Seconds since 1970, [n]."""

    values: NDArray[np.float64]
    """[n], NaN included."""

    @property
    def is_empty(self) -> bool:
        """Whether no value is finite."""
        return not np.isfinite(self.values).any()


@dataclass(frozen=True, slots=True)
class Span:
    """A time range."""

    start: float
    """Seconds since 1970."""

    end: float
    """Seconds since 1970."""

    step_s: float
    """Seconds between two points."""


def query_range(url: str, expr: str, span: Span) -> list[Series]:
    """Evaluate a query at every step of a time range.

    Raises:
        QueryError: the query is invalid, or the server does not answer.
    """
    parameters = {"query": expr, "start": f"{span.start:.3f}", "end": f"{span.end:.3f}", "step": f"{span.step_s:g}"}
    try:
        answer = httpx2.post(f"{url}/api/v1/query_range", data=parameters, timeout=TIMEOUT_S)
    except httpx2.HTTPError as error:
        raise QueryError(f"Prometheus at {url} does not answer: {type(error).__name__}.") from error
    body: dict[str, Any] = answer.json()
    if body["status"] != "success":
        raise QueryError(f"{body['error']}: {expr}")
    return [_series(found) for found in body["data"]["result"]]


def _series(found: dict[str, Any]) -> Series:
    points = np.array([[float(time), float(value)] for time, value in found["values"]], np.float64)
    return Series(found["metric"], points[:, 0], points[:, 1])
