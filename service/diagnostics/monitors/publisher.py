"""Publishes the monitors as Prometheus metrics: counters over all items, gauges of the window.

Counters are sums that PromQL can combine over any time range and any number of replicas; gauges describe the window of
one replica.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.detectors import ONE_SIDED_TESTS
from service.diagnostics.monitors.alarms import SIGNALS
from service.diagnostics.monitors.cusum import Cusum
from service.diagnostics.monitors.drift_monitor import UNCALIBRATED, DriftSubject
from service.diagnostics.monitors.drift_report import alarm_name, changes_of
from service.diagnostics.monitors.moments import centered_within
from service.diagnostics.monitors.monitor import Monitors, MonitorState
from service.diagnostics.monitors.observation import MAX_SURPRISE, Observation, ObservedItems
from service.diagnostics.monitors.reference import MonitorReference
from service.diagnostics.monitors.report import reward_gap, style_r_squared, tie_rate, window_correlation
from service.diagnostics.monitors.window import count_best, count_pairs
from service.diagnostics.ood import COMPONENTS, reason_of
from service.metrics import STYLES, Metrics
from service.records import SCOPES, OodReport, Scope, StyleReport
from service.settings import MonitorSettings

UNCALIBRATED_SCALE = ((0.0, 5.0), (1.0, 1.0))
"""Means and standard deviations by which reward and log length are standardised without a calibration. The correlation
does not depend on them, as long as all replicas use the same ones; these keep the sums small."""

REASONS = (
    *(reason_of("text", test) for test in range(len(ONE_SIDED_TESTS))),
    *(reason_of(component, 0) for component in (*COMPONENTS[1:], "siblings")),
    "nonfinite",
)
"""All reasons of a flag; their series start at zero, so that increase() includes the first flag."""


def watch_stream(
    metrics: Metrics,
    reference: MonitorReference | None,
    settings: MonitorSettings,
    subject: DriftSubject = UNCALIBRATED,
) -> Monitors:
    """Return the monitors of a replica, whose items are counted in its metrics.

    Args:
        metrics: metrics of the replica.
        reference: reference of the calibration; None without one.
        settings: windows and thresholds.
        subject: what the drift monitors compare.
    """
    publisher = Publisher(metrics, reference, settings, subject)
    monitors = Monitors(settings, reference, publisher.count, subject=subject)
    publisher.watch(monitors)
    return monitors


class Publisher:
    """Updates a replica's metrics from its monitors.

    Args:
        metrics: metrics of the replica.
        reference: reference of the calibration; None without one.
        settings: thresholds of the alarms.
        subject: what the drift monitors compare.
    """

    def __init__(
        self,
        metrics: Metrics,
        reference: MonitorReference | None,
        settings: MonitorSettings,
        subject: DriftSubject = UNCALIBRATED,
    ) -> None:
        self._metrics = metrics
        self._reference = reference
        self._settings = settings
        self._subject = subject
        self._scale = np.array(UNCALIBRATED_SCALE if reference is None else _scale_of(reference))
        compared = ("start",) if subject.reference is None else ("start", "calibration")
        signals = (*SIGNALS, *map(alarm_name, compared))
        self._counted_alarms = dict.fromkeys(signals, 0)
        for signal in signals:
            metrics.alarms.labels(signal=signal)
        for reason in REASONS:
            metrics.ood_flag.labels(reason=reason)

    def watch(self, monitors: Monitors) -> None:
        """Update the metrics from these monitors before every scrape."""

        def refresh() -> None:
            monitors.flush()
            state = monitors.state()
            if state is not None:
                self.show(state)

        self._metrics.refresh_with(refresh)

    def count(self, items: ObservedItems, observations: Sequence[Observation]) -> None:
        """Count items; each must come once, and all completions of a prompt in one call."""
        self._count_moments(items)
        self._count_groups(items)
        for seen in observations:
            if seen.score.reward_z is not None:
                self._metrics.reward_z.observe(seen.score.reward_z)
            if seen.score.ood is not None:
                self._count_ood(seen.score.ood)
        self._count_styles([seen.score.style for seen in observations if seen.score.style is not None])

    def show(self, state: MonitorState) -> None:
        """Set the gauges to the values of a window."""
        metrics, statistics = self._metrics, state.statistics
        for scope in SCOPES:
            found = window_correlation(statistics, scope)
            metrics.length_corr.labels(scope=scope).set(_or_nan(found.r))
            metrics.length_corr_ci_low.labels(scope=scope).set(_or_nan(found.bound))
            self._show_rules(scope, found.bound)
        metrics.style_r2.set(_or_nan(style_r_squared(statistics)))
        metrics.group_centered.set(statistics.lengths_within.count)
        metrics.ood_reward_gap.set(_or_nan(reward_gap(statistics, self._reference)))
        metrics.tie_rate.set(_or_nan(tie_rate(statistics)))
        metrics.cusum_threshold.set(state.threshold)
        for signal, total in state.sums.items():
            self._show_sum(signal, total, state.num_alarms.get(signal, 0))
        metrics.drift_threshold.set(state.drift.threshold)
        for against, comparison in state.drift.comparisons.items():
            metrics.drift_evidence.labels(against=against).set(comparison.log_evidence)
            self._show_alarm(alarm_name(against), alarm_name(against), comparison.alarm, comparison.num_alarms)
            for change in changes_of(state.drift, self._subject, against):
                metrics.drift_change.labels(against=against, statistic=change.statistic).set(change.z)

    def _show_rules(self, scope: Scope, bound: float | None) -> None:
        settings = self._settings
        lower = bound or 0.0
        for rule, value, severity in (
            ("reward_length_corr", lower > settings.length_corr_warn, "warn"),
            ("reward_length_r2", lower**2 > settings.length_r2_critical, "critical"),
        ):
            self._metrics.alarm.labels(signal=f"{rule}_{scope}", severity=severity).set(value)

    def _show_sum(self, signal: str, total: Cusum, num_alarms: int) -> None:
        metrics = self._metrics
        metrics.cusum.labels(signal=signal, direction="up").set(total.up)
        metrics.cusum.labels(signal=signal, direction="down").set(total.down)
        self._show_alarm(signal, f"cusum_{signal}", total.alarming, num_alarms)

    def _show_alarm(self, signal: str, name: str, is_on: bool, num_alarms: int) -> None:
        self._metrics.alarm.labels(signal=name, severity="warn").set(is_on)
        self._metrics.alarms.labels(signal=signal).inc(num_alarms - self._counted_alarms[signal])
        self._counted_alarms[signal] = num_alarms

    def _count_moments(self, items: ObservedItems) -> None:
        rows, prompts = items.known("reward", "log_tokens")
        _, members, sizes = np.unique(prompts, return_inverse=True, return_counts=True)
        standardised = (rows - self._scale[0]) / self._scale[1]
        self._add_moments("pooled", standardised, len(sizes))
        has_siblings = sizes[members] > 1
        if has_siblings.any():
            centered = centered_within(standardised, members)[has_siblings]
            self._add_moments("within", centered, int((sizes > 1).sum()))

    def _add_moments(self, scope: Scope, z: NDArray[np.float64], num_groups: int) -> None:
        reward, length = z[:, 0], z[:, 1]
        sums = {
            "n": len(z),
            "groups": num_groups,
            "zr_pos": np.maximum(reward, 0.0).sum(),
            "zr_neg": np.maximum(-reward, 0.0).sum(),
            "zl_pos": np.maximum(length, 0.0).sum(),
            "zl_neg": np.maximum(-length, 0.0).sum(),
            "zr2": (reward**2).sum(),
            "zl2": (length**2).sum(),
            "sum2": ((reward + length) ** 2).sum(),
            "diff2": ((reward - length) ** 2).sum(),
        }
        for stat, value in sums.items():
            self._metrics.moment.labels(stat=stat, scope=scope).inc(float(value))

    def _count_groups(self, items: ObservedItems) -> None:
        with_ood, ood_prompts = items.known("reward", "flag")
        num_groups, num_top1_ood = count_best(with_ood[:, 0], with_ood[:, 1] > 0, ood_prompts)
        rewards, prompts = items.known("reward")
        num_pairs, num_tied = count_pairs(rewards[:, 0], prompts)
        self._metrics.groups.inc(num_groups)
        self._metrics.top1_ood.inc(num_top1_ood)
        self._metrics.pairs.inc(num_pairs)
        self._metrics.tied_pairs.inc(num_tied)

    def _count_ood(self, ood: OodReport) -> None:
        self._metrics.ood_pvalue.observe(ood.p_value)
        self._metrics.ood_neglogp.inc(min(ood.surprise, MAX_SURPRISE))
        if ood.flag:
            self._metrics.ood_flag.labels(reason=ood.reason).inc()

    def _count_styles(self, styles: Sequence[StyleReport]) -> None:
        for kind in STYLES:
            self._metrics.style.labels(kind=kind).inc(sum(getattr(style, kind) for style in styles))
        self._metrics.words.inc(sum(style.words for style in styles))


def _scale_of(reference: MonitorReference) -> tuple[tuple[float, float], tuple[float, float]]:
    reward, length = reference.signals["reward"], reference.signals["log_tokens"]
    return (reward.mean, length.mean), (reward.sd, length.sd)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
