"""One reading of a window: a value with its interval, sample size, reference, threshold and state.

Pure. The builders take what a reading is computed from; which readings there are is listed in ``report``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from service.diagnostics.monitors.moments import Z95, Moments
from service.diagnostics.monitors.reference import SignalReference
from service.diagnostics.monitors.window import WindowStatistics
from service.records import Scope

State: TypeAlias = Literal["ok", "warn", "critical", "unknown", "shown"]
Interval: TypeAlias = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Reading:
    """One monitor, as in ``/v1/monitor``."""

    name: str

    metric: str
    """What the value is (its statistic and unit)."""

    definition: str
    """A sentence for the reader of ``/v1/monitor``."""

    value: float | None

    n: int
    """Number of items, groups or pairs that the value is computed from."""

    scope: Scope | None = None
    feature: str | None = None

    interval: Interval | None = None
    """95 percent confidence interval."""

    ess: float | None = None
    """Effective sample size: number of independent items that would give the same standard error."""

    reference: float | None = None
    """The value on the calibration's own items."""

    threshold: float | None = None
    """Limit that the state depends on; without one the state is ``shown``."""

    state: State = "unknown"


def mean_reading(
    name: str,
    metric: str,
    definition: str,
    moments: Moments,
    index: int,
    statistics: WindowStatistics,
    signal: SignalReference | None,
    *,
    in_deviations: bool = False,
) -> Reading:
    """Return the reading of a mean, with an interval that accounts for the clustering by prompt.

    Args:
        name: name of the monitor.
        metric: what the value is.
        definition: a sentence for the reader.
        moments: moments of the window.
        index: index of the variable in the moments.
        statistics: statistics of the window, for its design effect.
        signal: the signal on the reference; None gives an unknown reading.
        in_deviations: whether to give the distance from the reference's mean in its standard deviations.
    """
    variance = moments.variance(index)
    if signal is None or variance is None:
        return Reading(name, metric, definition, None, moments.count)
    shift, scale = (signal.mean, signal.sd) if in_deviations else (0.0, 1.0)
    value = (float(moments.mean[index]) - shift) / scale
    ess = moments.count / statistics.clusters.design_effect(signal.intraclass)
    half_width = Z95 * math.sqrt(variance / ess) / scale
    return Reading(
        name,
        metric,
        definition,
        value,
        moments.count,
        interval=(value - half_width, value + half_width),
        ess=ess,
        reference=(signal.mean - shift) / scale,
        state="shown",
    )


def share_reading(
    name: str,
    definition: str,
    count: int,
    total: int,
    clustered: WindowStatistics | None,
    signal: SignalReference | None,
) -> Reading:
    """Return the reading of a share with its Wilson interval; its threshold is twice the reference's share.

    Args:
        name: name of the monitor.
        definition: a sentence for the reader.
        count: items that have the property.
        total: items of which it is known.
        clustered: statistics of the window, for its design effect; None where the units are independent.
        signal: the signal on the reference; None gives an unknown reading.
    """
    if signal is None or not total:
        return Reading(name, "share", definition, None, total)
    ess = total / clustered.clusters.design_effect(signal.intraclass) if clustered else float(total)
    interval = _wilson(count / total, ess)
    threshold = 2.0 * signal.mean
    return Reading(
        name,
        "share",
        definition,
        count / total,
        total,
        interval=interval,
        ess=ess,
        reference=signal.mean,
        threshold=threshold,
        state=state_of(interval[0], threshold, "warn"),
    )


def state_of(bound: float | None, threshold: float, worse: Literal["warn", "critical"]) -> State:
    """Return the state of a monitor by the lower bound of its value; None is unknown."""
    if bound is None:
        return "unknown"
    return worse if bound > threshold else "ok"


def squared(interval: Interval) -> Interval:
    """Return the interval of the squares of the values in an interval."""
    low, high = sorted(abs(bound) for bound in interval)
    return (0.0 if interval[0] < 0 < interval[1] else low**2), high**2


def _wilson(share: float, size: float) -> Interval:
    """Return the 95 percent score interval of a share (Wilson, 1927)."""
    weight = Z95**2 / size
    center = (share + weight / 2) / (1 + weight)
    half_width = Z95 / (1 + weight) * math.sqrt(share * (1 - share) / size + weight / (4 * size))
    return max(0.0, center - half_width), min(1.0, center + half_width)
