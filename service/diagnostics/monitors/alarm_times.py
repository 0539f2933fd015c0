"""When the alarms of a monitor began.

Pure. The rules are checked whenever a batch is complete, so that an alarm has a time also where nobody asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import reduce

from service.diagnostics.monitors.reference import MonitorReference
from service.diagnostics.monitors.report import ood_rates, window_correlation
from service.diagnostics.monitors.window import EMPTY, WindowStatistics
from service.records import SCOPES
from service.settings import MonitorSettings

AlarmTimes = dict[str, float]
"""Seconds since 1970, by the name of the alarm; one with a scope has it behind its name."""


def window_alarms(
    batches: Iterable[WindowStatistics], reference: MonitorReference | None, settings: MonitorSettings
) -> set[str]:
    """Return the names of the alarms that are on, those of cumulative sums and of single outputs left out.

    Args:
        batches: of the window.
        reference: of the calibration; None without one.
        settings: the thresholds.
    """
    window = reduce(_merged, batches, EMPTY)
    found = set()
    for scope in SCOPES:
        bound = window_correlation(window, scope).bound or 0.0
        if bound > settings.length_corr_warn:
            found.add(f"reward_length_corr_{scope}")
        if bound**2 > settings.length_r2_critical:
            found.add(f"reward_length_r2_{scope}")
    return found | {rate.name for rate in ood_rates(window, reference) if rate.state == "warn"}


def earliest(one: Mapping[str, float], other: Mapping[str, float]) -> AlarmTimes:
    """Return the times of two replicas together: of an alarm that is on in both, the earlier one."""
    return {name: min(times[name] for times in (one, other) if name in times) for name in {*one, *other}}


def iso_time(seconds: float) -> str:
    """Return seconds since 1970 in ISO 8601, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _merged(one: WindowStatistics, other: WindowStatistics) -> WindowStatistics:
    """Merge what `window_alarms` reads, which takes a fraction of the time of merging everything."""
    return replace(
        one,
        clusters=one.clusters.merged(other.clusters),
        lengths=one.lengths.merged(other.lengths),
        lengths_within=one.lengths_within.merged(other.lengths_within),
        surprises=one.surprises.merged(other.surprises),
        num_flagged=one.num_flagged + other.num_flagged,
        num_groups_with_ood=one.num_groups_with_ood + other.num_groups_with_ood,
        num_top1_ood=one.num_top1_ood + other.num_top1_ood,
    )
