"""Reads a window off: every monitor with its value, interval, sample size, reference, threshold and definition.

Pure. A value that cannot be known is None, with the state ``unknown``; nothing is filled in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from service.diagnostics.monitors.alarms import SCOPES, LengthCorrelation, Scope, length_correlation
from service.diagnostics.monitors.cusum import Cusum
from service.diagnostics.monitors.moments import (
    Z95,
    Matrix,
    Moments,
    correlation_interval,
    partial_correlation,
    pearson,
    regress,
)
from service.diagnostics.monitors.reference import (
    MonitorReference,
    SignalReference,
    intraclass_correlation,
)
from service.diagnostics.monitors.window import STYLE_COLUMNS, WindowStatistics
from service.settings import MonitorSettings

State: TypeAlias = Literal["ok", "warn", "critical", "unknown", "shown"]
Interval: TypeAlias = tuple[float, float]

_REGRESSORS = range(1, len(STYLE_COLUMNS))


@dataclass(frozen=True, slots=True)
class Reading:
    """One monitor.

    ``interval``: 95 percent. ``n``: items, groups or pairs that it is over; ``ess``: as many independent ones would
    tell as much. ``reference``: the value on the calibration's own items. ``threshold``: what the state is judged by;
    without one the state is ``shown``.
    """

    name: str
    metric: str
    definition: str
    value: float | None
    n: int
    scope: Scope | None = None
    feature: str | None = None
    interval: Interval | None = None
    ess: float | None = None
    reference: float | None = None
    threshold: float | None = None
    state: State = "unknown"


@dataclass(frozen=True, slots=True)
class SignalReading:
    """One cumulative sum: how far it has run either way, whether it is in alarm, and how often it has been."""

    signal: str
    up: float
    down: float
    threshold: float
    alarm: bool
    num_alarms: int


def read_window(
    statistics: WindowStatistics, reference: MonitorReference | None, settings: MonitorSettings
) -> list[Reading]:
    """Read every monitor off a window, those of length first, as they are asked about most."""
    return [
        *_length_readings(statistics, reference, settings),
        *_style_readings(statistics, reference),
        *_ood_readings(statistics, reference),
        *_drift_readings(statistics, reference),
        *_group_readings(statistics),
    ]


def read_sums(sums: Mapping[str, Cusum], num_alarms: Mapping[str, int], threshold: float) -> list[SignalReading]:
    """Read the cumulative sums off."""
    return [
        SignalReading(name, total.up, total.down, threshold, total.alarming, num_alarms.get(name, 0))
        for name, total in sums.items()
    ]


def window_correlation(statistics: WindowStatistics, scope: Scope) -> LengthCorrelation:
    """Return the window's correlation of reward and log length, its size corrected for how the window clusters."""
    return length_correlation(statistics, scope, _live_intraclass(statistics))


def style_r_squared(statistics: WindowStatistics) -> float | None:
    """Return the share of the rewards' variance within prompts that length and style explain; None where unknown."""
    fit = regress(statistics.styles_within.comoment, 0, _REGRESSORS)
    return None if fit is None else fit.r_squared


def reward_gap(statistics: WindowStatistics, reference: MonitorReference | None) -> float | None:
    """Return by how many reference deviations the flagged items are rewarded above the others; None where unknown."""
    flagged, unflagged = statistics.flagged_rewards, statistics.unflagged_rewards
    if reference is None or not flagged.count or not unflagged.count:
        return None
    return float(flagged.mean[0] - unflagged.mean[0]) / reference.signals["reward"].sd


def tie_rate(statistics: WindowStatistics) -> float | None:
    """Return the share of pairs of completions of one prompt that have the same reward; None without pairs."""
    return statistics.num_tied_pairs / statistics.num_pairs if statistics.num_pairs else None


def _live_intraclass(statistics: WindowStatistics) -> float:
    reward, length = (
        intraclass_correlation(statistics.lengths, statistics.lengths_within, statistics.clusters, index)
        for index in (0, 1)
    )
    return max(0.0, reward) * max(0.0, length)


def _length_readings(
    statistics: WindowStatistics, reference: MonitorReference | None, settings: MonitorSettings
) -> Iterator[Reading]:
    for scope in reversed(SCOPES):  # the within-prompt value first: pooling hides bias
        found = window_correlation(statistics, scope)
        expected = _reference_correlation(reference, scope)
        interval = None if found.r is None else correlation_interval(found.r, found.size)
        yield Reading(
            name="reward_length_corr",
            metric="pearson_r",
            definition=_CORRELATION[scope] + " 'r > 0.3': warns when the least |r| that the data allow is above.",
            value=found.r,
            n=found.n,
            scope=scope,
            interval=interval,
            ess=max(0.0, found.size),
            reference=expected,
            threshold=settings.length_corr_warn,
            state=_judged(found.bound, settings.length_corr_warn, "warn"),
        )
        yield Reading(
            name="reward_length_r2",
            metric="r_squared",
            definition=_CORRELATION[scope]
            + " 'r squared > 0.3', which is |r| > 0.548: critical by the same bound, squared.",
            value=None if found.r is None else found.r**2,
            n=found.n,
            scope=scope,
            interval=None if interval is None else _squared(interval),
            ess=max(0.0, found.size),
            reference=None if expected is None else expected**2,
            threshold=settings.length_r2_critical,
            state=_judged(None if found.bound is None else found.bound**2, settings.length_r2_critical, "critical"),
        )


_CORRELATION: dict[Scope, str] = {
    "within": "Correlation of reward and ln(1 + completion tokens) about the means of the prompts.",
    "pooled": "Correlation of reward and ln(1 + completion tokens) over all items.",
}


def _reference_correlation(reference: MonitorReference | None, scope: Scope) -> float | None:
    if reference is None:
        return None
    return pearson(reference.styles_within.comoment if scope == "within" else reference.styles.comoment)


def _style_readings(statistics: WindowStatistics, reference: MonitorReference | None) -> Iterator[Reading]:
    comoments: dict[Scope, tuple[Matrix, int, int, Matrix | None]] = {
        "within": (
            statistics.styles_within.comoment,
            statistics.styles_within.count,
            statistics.styles_within.num_groups,
            reference.styles_within.comoment if reference else None,
        ),
        "pooled": (
            statistics.styles.comoment,
            statistics.styles.count,
            1,
            reference.styles.comoment if reference else None,
        ),
    }
    for scope, (comoment, n, num_means, expected) in comoments.items():
        freedom = n - num_means - len(_REGRESSORS)
        yield from _regression_readings(scope, comoment, n, freedom, expected)
        yield from _partial_readings(scope, comoment, n, freedom, expected)


def _regression_readings(
    scope: Scope, comoment: Matrix, n: int, freedom: int, expected: Matrix | None
) -> Iterator[Reading]:
    fit = regress(comoment, 0, _REGRESSORS) if freedom > 0 else None
    usual = None if expected is None else regress(expected, 0, _REGRESSORS)
    yield Reading(
        name="style_r2",
        metric="r_squared",
        definition="Share of the rewards' variance that length and style explain together.",
        value=None if fit is None else fit.r_squared,
        n=n,
        scope=scope,
        ess=max(0.0, float(freedom)),
        reference=None if usual is None else usual.r_squared,
        state="unknown" if fit is None else "shown",
    )
    for place, index in enumerate(_REGRESSORS):
        slope = None if fit is None else fit.slopes[place]
        yield Reading(
            name="style_slope",
            metric="reward_per_log_token" if index == 1 else "reward_per_tell_per_100_words",
            definition="Slope of the reward in the joint least squares on length and style.",
            value=slope,
            n=n,
            scope=scope,
            feature=STYLE_COLUMNS[index],
            ess=max(0.0, float(freedom)),
            reference=None if usual is None else usual.slopes[place],
            state="unknown" if slope is None else "shown",
        )


def _partial_readings(
    scope: Scope, comoment: Matrix, n: int, freedom: int, expected: Matrix | None
) -> Iterator[Reading]:
    for index in _REGRESSORS:
        others = [other for other in _REGRESSORS if other != index]
        r = partial_correlation(comoment, 0, index, others) if freedom > 1 else None
        yield Reading(
            name="partial_corr",
            metric="partial_r",
            definition="Correlation with the reward, the other features held fixed.",
            value=r,
            n=n,
            scope=scope,
            feature=STYLE_COLUMNS[index],
            interval=None if r is None else correlation_interval(r, freedom - 1),
            ess=max(0.0, float(freedom)),
            reference=None if expected is None else partial_correlation(expected, 0, index, others),
            state="unknown" if r is None else "shown",
        )


def _ood_readings(statistics: WindowStatistics, reference: MonitorReference | None) -> Iterator[Reading]:
    flag = reference.signals["flag"] if reference else None
    yield _share_reading(
        "ood_rate",
        "Share of items flagged as out of distribution; warns when at least twice that of the reference.",
        statistics.num_flagged,
        statistics.num_judged,
        statistics,
        flag,
    )
    surprise = reference.signals["surprise"] if reference else None
    yield _mean_reading(
        "mean_surprise",
        "mean_neg_log_p",
        "Mean of the combined -ln p, capped at 12: the most sensitive general signal; see its cumulative sum.",
        statistics.surprises,
        0,
        statistics,
        surprise,
    )
    gap = reward_gap(statistics, reference)
    yield Reading(
        name="ood_reward_gap",
        metric="reference_sd",
        definition="Mean reward of flagged items less that of the others: positive and flags rising is hacking.",
        value=gap,
        n=statistics.num_flagged,
        interval=_gap_interval(statistics, reference, gap),
        state="unknown" if gap is None else "shown",
    )
    yield _share_reading(
        "top1_ood_rate",
        "Share of prompts whose best completion is flagged; expected as often as a flag.",
        statistics.num_top1_ood,
        statistics.num_judged_groups,
        None,
        flag,
    )


def _drift_readings(statistics: WindowStatistics, reference: MonitorReference | None) -> Iterator[Reading]:
    for name, moments, index in (("reward", statistics.rewards, 0), ("log_tokens", statistics.lengths, 1)):
        signal = reference.signals[name] if reference else None  # type: ignore[index]  # both are columns
        yield _mean_reading(
            f"{name}_drift",
            "mean_z",
            "Mean less that of the reference, in reference deviations; alarmed on by its cumulative sum.",
            moments,
            index,
            statistics,
            signal,
            in_deviations=True,
        )


def _group_readings(statistics: WindowStatistics) -> Iterator[Reading]:
    for name, definition, count, total in (
        ("tie_rate", "Share of pairs of completions of one prompt with the same reward.", statistics.num_tied_pairs,
         statistics.num_pairs),
        ("truncation_rate", "Share of items of which the model read only a part.", statistics.num_truncated,
         statistics.num_items),
    ):  # fmt: skip
        value = count / total if total else None
        yield Reading(name, "share", definition, value, total, state="unknown" if value is None else "shown")


def _mean_reading(
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
    variance = moments.variance(index)
    if signal is None or variance is None:
        return Reading(name, metric, definition, None, moments.count)
    shift, scale = (signal.mean, signal.sd) if in_deviations else (0.0, 1.0)
    value = (float(moments.mean[index]) - shift) / scale
    ess = moments.count / statistics.clusters.design_effect(signal.intraclass)
    reach = Z95 * math.sqrt(variance / ess) / scale
    return Reading(
        name,
        metric,
        definition,
        value,
        moments.count,
        interval=(value - reach, value + reach),
        ess=ess,
        reference=(signal.mean - shift) / scale,
        state="shown",
    )


def _share_reading(
    name: str,
    definition: str,
    count: int,
    total: int,
    clustered: WindowStatistics | None,
    signal: SignalReference | None,
) -> Reading:
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
        state=_judged(interval[0], threshold, "warn"),
    )


def _judged(bound: float | None, threshold: float, worse: Literal["warn", "critical"]) -> State:
    if bound is None:
        return "unknown"
    return worse if bound > threshold else "ok"


def _squared(interval: Interval) -> Interval:
    low, high = sorted(abs(bound) for bound in interval)
    return (0.0 if interval[0] < 0 < interval[1] else low**2), high**2


def _wilson(share: float, size: float) -> Interval:
    """Return the 95 percent score interval of a share (Wilson, 1927)."""
    weight = Z95**2 / size
    center = (share + weight / 2) / (1 + weight)
    reach = Z95 / (1 + weight) * math.sqrt(share * (1 - share) / size + weight / (4 * size))
    return max(0.0, center - reach), min(1.0, center + reach)


def _gap_interval(
    statistics: WindowStatistics, reference: MonitorReference | None, gap: float | None
) -> Interval | None:
    parts = statistics.flagged_rewards, statistics.unflagged_rewards
    variances = [part.variance(0) for part in parts]
    if reference is None or gap is None or None in variances:
        return None
    error = math.sqrt(sum(float(variance or 0.0) / part.count for variance, part in zip(variances, parts, strict=True)))
    reach = Z95 * error / reference.signals["reward"].sd
    return gap - reach, gap + reach
