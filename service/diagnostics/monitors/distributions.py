"""The distributions behind the figures of a monitor: histograms of rewards and p-values, and some items to draw.

Pure. Windows store three numbers of each item; the histograms are computed from them when they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.monitors.observation import Observation
from service.diagnostics.reference import Reference

REWARD_BINS = 24
P_VALUE_BINS = 20
TAIL = 0.005
"""Share of either end of the rewards that the first and the last bin take up, so that no outlier stretches the axis."""

MAX_POINTS = 400
"""Items that are listed one by one; of a larger window every second, third, ... one."""

NO_ITEMS: NDArray[np.float32] = np.empty((0, 3), np.float32)


def numbers_of(observations: Sequence[Observation]) -> NDArray[np.float32]:
    """Return reward, completion tokens and p-value of items, float32 [n, 3], NaN where unknown."""
    rows = [(seen.values[0], _or_nan(seen.num_completion_tokens), _p_value(seen)) for seen in observations]
    return np.array(rows, np.float32).reshape(-1, 3)


def describe_distributions(items: NDArray[np.float32], rewards: Reference | None, alpha: float) -> dict[str, Any]:
    """Return the distributions of a window as JSON-ready values for ``/v1/monitor``.

    Args:
        items: of `numbers_of`.
        rewards: rewards of the calibration's items; None without a calibration.
        alpha: p-value up to which an item is flagged.
    """
    return {
        "alpha": alpha,
        "reward": _reward_histogram(_known(items[:, 0]), rewards),
        "p_value": _p_value_histogram(_known(items[:, 2])),
        "points": _points(items),
    }


def _reward_histogram(values: NDArray[np.float64], rewards: Reference | None) -> dict[str, Any]:
    """Count rewards in bins of equal width; beyond the tails they count in the first and the last bin."""
    samples = [sample for sample in (values, None if rewards is None else rewards.quantiles) if sample is not None]
    samples = [sample for sample in samples if len(sample)]
    if not samples:
        return {"edges": [], "counts": [], "reference": None}
    low = min(float(np.quantile(sample, TAIL)) for sample in samples)
    high = max(float(np.quantile(sample, 1 - TAIL)) for sample in samples)
    edges = np.linspace(low, high if high > low else low + 1.0, REWARD_BINS + 1)
    expected = None if rewards is None else _counts(rewards.quantiles, edges) / len(rewards.quantiles)
    return {
        "edges": edges.round(4).tolist(),
        "counts": _counts(values, edges).tolist(),
        "reference": None if expected is None else expected.round(5).tolist(),
    }


def _p_value_histogram(values: NDArray[np.float64]) -> dict[str, Any]:
    edges = np.linspace(0.0, 1.0, P_VALUE_BINS + 1)
    return {
        "edges": edges.round(4).tolist(),
        "counts": _counts(values, edges).tolist(),
        "reference": [1 / P_VALUE_BINS] * P_VALUE_BINS,
    }


def _points(items: NDArray[np.float32]) -> dict[str, Any]:
    """List items of which reward and length are known, evenly spaced over the window."""
    known = items[~np.isnan(items[:, :2]).any(axis=1)]
    every = max(1, math.ceil(len(known) / MAX_POINTS))
    rewards, tokens, p_values = known[::every].astype(np.float64).T
    return {
        "every": every,
        "reward": rewards.round(4).tolist(),
        "completion_tokens": tokens.astype(int).tolist(),
        "p_value": [None if math.isnan(value) else round(value, 5) for value in p_values.tolist()],
    }


def _counts(values: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]


def _known(values: NDArray[np.float32]) -> NDArray[np.float64]:
    return values[~np.isnan(values)].astype(np.float64)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _p_value(seen: Observation) -> float:
    return math.nan if seen.score.ood is None else seen.score.ood.p_value
