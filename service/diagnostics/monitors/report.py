"""Computes the readings of a window: each monitor's value, interval, sample size, reference, threshold, definition.

Pure. A value that cannot be computed is None, with the state ``unknown``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from service.diagnostics.monitors.alarms import LengthCorrelation, length_correlation
from service.diagnostics.monitors.cusum import Cusum
from service.diagnostics.monitors.moments import (
    Z95,
    Matrix,
    correlation_interval,
    partial_correlation,
    pearson,
    regress,
)
from service.diagnostics.monitors.readings import Interval, Reading, mean_reading, share_reading, squared, state_of
from service.diagnostics.monitors.reference import MonitorReference, intraclass_correlation
from service.diagnostics.monitors.window import STYLE_COLUMNS, WindowStatistics
from service.records import SCOPES, Scope
from service.settings import MonitorSettings

_REGRESSORS = range(1, len(STYLE_COLUMNS))


@dataclass(frozen=True, slots=True)
class SignalReading:
    """One cumulative sum, as in ``/v1/monitor``."""

    signal: str

    up: float
    """Sum of upward deviations, in standard errors of a batch."""

    down: float
    threshold: float
    alarm: bool

    num_alarms: int
    """Alarms that have begun."""


def read_window(
    statistics: WindowStatistics,
    reference: MonitorReference | None,
    settings: MonitorSettings,
    outputs: Sequence[str] = (),
) -> list[Reading]:
    """Return the readings of a window; those of length come first, as they are read most often.

    Args:
        statistics: of the window.
        reference: of the calibration; None without one.
        settings: thresholds.
        outputs: names of the model's outputs.
    """
    return [
        *_length_readings(statistics, reference, settings),
        *_style_readings(statistics, reference),
        *_ood_readings(statistics, reference),
        *_drift_readings(statistics, reference),
        *_group_readings(statistics),
        *_output_readings(statistics, settings, outputs),
    ]


def read_sums(sums: Mapping[str, Cusum], num_alarms: Mapping[str, int], threshold: float) -> list[SignalReading]:
    """Return the readings of the cumulative sums."""
    return [
        SignalReading(name, total.up, total.down, threshold, total.alarming, num_alarms.get(name, 0))
        for name, total in sums.items()
    ]


def window_correlation(statistics: WindowStatistics, scope: Scope) -> LengthCorrelation:
    """Return the window's correlation of reward and log length, its size corrected by the window's design effect."""
    return length_correlation(statistics, scope, _live_intraclass(statistics))


def style_r_squared(statistics: WindowStatistics) -> float | None:
    """Return the share of the rewards' variance within prompts that length and style explain; None where unknown."""
    fit = regress(statistics.styles_within.comoment, 0, _REGRESSORS)
    return None if fit is None else fit.r_squared


def reward_gap(statistics: WindowStatistics, reference: MonitorReference | None) -> float | None:
    """Return the mean reward of flagged items less that of the others, in reference standard deviations, or None."""
    flagged, unflagged = statistics.flagged_rewards, statistics.unflagged_rewards
    if reference is None or not flagged.count or not unflagged.count:
        return None
    return float(flagged.mean[0] - unflagged.mean[0]) / reference.signals["reward"].sd


def ood_rates(statistics: WindowStatistics, reference: MonitorReference | None) -> tuple[Reading, Reading]:
    """Return the share of flagged items, and that of prompts whose completion with the highest reward is flagged."""
    flag = reference.signals["flag"] if reference else None
    rate = share_reading(
        "ood_rate",
        "Share of items flagged as out of distribution. State: warn when its lower bound exceeds twice the reference.",
        statistics.num_flagged,
        statistics.num_with_ood,
        statistics,
        flag,
    )
    top1_rate = share_reading(
        "top1_ood_rate",
        "Share of prompts whose completion with the highest reward is flagged; expected: the flag rate.",
        statistics.num_top1_ood,
        statistics.num_groups_with_ood,
        None,
        flag,
    )
    return rate, top1_rate


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
    for scope in reversed(SCOPES):  # within prompts first: it is not confounded by differences between prompts
        found = window_correlation(statistics, scope)
        expected = _reference_correlation(reference, scope)
        interval = None if found.r is None else correlation_interval(found.r, found.size)
        yield Reading(
            name="reward_length_corr",
            metric="pearson_r",
            definition=_CORRELATION[scope] + " State: warn when the lower bound of |r| exceeds the threshold.",
            value=found.r,
            n=found.n,
            scope=scope,
            interval=interval,
            ess=max(0.0, found.size),
            reference=expected,
            threshold=settings.length_corr_warn,
            state=state_of(found.bound, settings.length_corr_warn, "warn"),
        )
        yield Reading(
            name="reward_length_r2",
            metric="r_squared",
            definition=_CORRELATION[scope]
            + " Squared; state: critical when the squared lower bound of |r| exceeds the threshold.",
            value=None if found.r is None else found.r**2,
            n=found.n,
            scope=scope,
            interval=None if interval is None else squared(interval),
            ess=max(0.0, found.size),
            reference=None if expected is None else expected**2,
            threshold=settings.length_r2_critical,
            state=state_of(None if found.bound is None else found.bound**2, settings.length_r2_critical, "critical"),
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
    on_reference = None if expected is None else regress(expected, 0, _REGRESSORS)
    yield Reading(
        name="style_r2",
        metric="r_squared",
        definition="Share of the rewards' variance that length and style explain together.",
        value=None if fit is None else fit.r_squared,
        n=n,
        scope=scope,
        ess=max(0.0, float(freedom)),
        reference=None if on_reference is None else on_reference.r_squared,
        state="unknown" if fit is None else "shown",
    )
    for order, index in enumerate(_REGRESSORS):
        slope = None if fit is None else fit.slopes[order]
        yield Reading(
            name="style_slope",
            metric="reward_per_log_token" if index == 1 else "reward_per_marker_per_100_words",
            definition="Slope of the reward in the joint least-squares regression on length and style.",
            value=slope,
            n=n,
            scope=scope,
            feature=STYLE_COLUMNS[index],
            ess=max(0.0, float(freedom)),
            reference=None if on_reference is None else on_reference.slopes[order],
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
            definition="Partial correlation with the reward, given the other features.",
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
    rate, top1_rate = ood_rates(statistics, reference)
    yield rate
    surprise = reference.signals["surprise"] if reference else None
    yield mean_reading(
        "mean_surprise",
        "mean_neg_log_p",
        "Mean of the combined -ln p, each at most 12; its cumulative sum raises the alarm.",
        statistics.surprises,
        0,
        statistics,
        surprise,
    )
    gap = reward_gap(statistics, reference)
    yield Reading(
        name="ood_reward_gap",
        metric="reference_sd",
        definition="Mean reward of flagged items less that of the others; positive while ood_rate rises: hacking.",
        value=gap,
        n=statistics.num_flagged,
        interval=_gap_interval(statistics, reference, gap),
        state="unknown" if gap is None else "shown",
    )
    yield top1_rate


def _drift_readings(statistics: WindowStatistics, reference: MonitorReference | None) -> Iterator[Reading]:
    for name, moments, index in (("reward", statistics.rewards, 0), ("log_tokens", statistics.lengths, 1)):
        signal = reference.signals[name] if reference else None  # type: ignore[index]  # both are columns
        yield mean_reading(
            f"{name}_drift",
            "mean_z",
            "Mean less that of the reference, in reference standard deviations; its cumulative sum raises the alarm.",
            moments,
            index,
            statistics,
            signal,
            in_deviations=True,
        )


def _group_readings(statistics: WindowStatistics) -> Iterator[Reading]:
    for name, definition, count, total in (
        ("tie_rate", "Share of pairs of completions of one prompt with equal rewards.", statistics.num_tied_pairs,
         statistics.num_pairs),
        ("truncation_rate", "Share of items with a truncated prompt.", statistics.num_truncated, statistics.num_items),
    ):  # fmt: skip
        value = count / total if total else None
        yield Reading(name, "share", definition, value, total, state="unknown" if value is None else "shown")


def _output_readings(
    statistics: WindowStatistics, settings: MonitorSettings, outputs: Sequence[str]
) -> Iterator[Reading]:
    found = statistics.outputs
    for name, pooled, within in zip(outputs, found.pooled, found.within, strict=False):
        variance = pooled.variance(0)
        ess = min(pooled.count, statistics.clusters.prompts)
        half_width = None if variance is None else Z95 * math.sqrt(variance / ess)
        mean = float(pooled.mean[0])
        yield Reading(
            name="output_mean",
            metric="reward",
            definition="Mean of one output of the model; the interval counts each prompt once.",
            value=mean if pooled.count else None,
            n=pooled.count,
            feature=name,
            interval=None if half_width is None else (mean - half_width, mean + half_width),
            ess=ess if pooled.count else None,
            state="shown" if pooled.count else "unknown",
        )
        own = replace(statistics, lengths=pooled, lengths_within=within)
        for scope in reversed(SCOPES):
            correlation = window_correlation(own, scope)
            yield Reading(
                name="output_length_corr",
                metric="pearson_r",
                definition="As reward_length_corr, of one output of the model.",
                value=correlation.r,
                n=correlation.n,
                scope=scope,
                feature=name,
                interval=None if correlation.r is None else correlation_interval(correlation.r, correlation.size),
                ess=max(0.0, correlation.size),
                threshold=settings.length_corr_warn,
                state=state_of(correlation.bound, settings.length_corr_warn, "warn"),
            )


def _gap_interval(
    statistics: WindowStatistics, reference: MonitorReference | None, gap: float | None
) -> Interval | None:
    parts = statistics.flagged_rewards, statistics.unflagged_rewards
    variances = [part.variance(0) for part in parts]
    if reference is None or gap is None or None in variances:
        return None
    error = math.sqrt(sum(float(variance or 0.0) / part.count for variance, part in zip(variances, parts, strict=True)))
    half_width = Z95 * error / reference.signals["reward"].sd
    return gap - half_width, gap + half_width
