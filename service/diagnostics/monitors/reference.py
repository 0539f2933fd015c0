"""What the monitored signals look like on the calibration's own items: the level from which drift is measured.

Fitted once by the calibration, on items scored through the serving path with prompts that nothing else was fitted to,
and stored in its artifact as a few small arrays. The monitors own the format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.monitors.moments import Moments, WithinMoments
from service.diagnostics.monitors.observation import Column, ObservedItems
from service.diagnostics.monitors.window import STYLE_COLUMNS, TELLS, Clusters, summarize

MEANS: tuple[Column, ...] = ("reward", "log_tokens", "surprise", "oe_surprise", "prompt_overlap")
"""Signals that are watched by their mean."""

SHARES: tuple[Column, ...] = ("flag", *TELLS)
"""Signals that are watched by the share of items that have them."""

TELL_QUANTILE = 0.95
_PREFIX = "monitor_"


@dataclass(frozen=True, slots=True)
class SignalReference:
    """A signal of the reference: its mean (of a share, the share) and standard deviation over items.

    ``intraclass``: correlation of two items of one prompt. ``effective_size``: independent items that would know the
    mean as well.
    """

    mean: float
    sd: float
    intraclass: float
    effective_size: float


_UNKNOWN = SignalReference(math.nan, math.nan, math.nan, math.nan)


@dataclass(frozen=True, slots=True, eq=False)
class MonitorReference:
    """The reference of the signals that it knows, and co-moments from which all its correlations and slopes follow.

    ``signals``: without ``oe_surprise`` where the calibration has no such detector. ``tell_thresholds`` [5]: the 95
    percent quantile of each of `TELLS`. ``styles``, ``styles_within``: of `STYLE_COLUMNS`.
    """

    clusters: Clusters
    signals: Mapping[Column, SignalReference]
    tell_thresholds: NDArray[np.float64]
    styles: Moments
    styles_within: WithinMoments

    @property
    def correlation_intraclass(self) -> float:
        """Product of the intraclass correlations of reward and length: what clustering does to their correlation."""
        return max(0.0, self.signals["reward"].intraclass) * max(0.0, self.signals["log_tokens"].intraclass)

    @property
    def correlation_size(self) -> float:
        """Independent items that would know the correlation of reward and length as well."""
        return self.clusters.items / self.clusters.design_effect(self.correlation_intraclass)

    def as_arrays(self) -> dict[str, NDArray[np.float64]]:
        """Return everything as float64 arrays, by the names they have in the artifact."""
        clusters = self.clusters
        named = [self.signals.get(name, _UNKNOWN) for name in (*MEANS, *SHARES)]
        arrays = {
            "clusters": [clusters.items, clusters.prompts, clusters.squares],
            "signals": [[signal.mean, signal.sd, signal.intraclass, signal.effective_size] for signal in named],
            "tell_thresholds": self.tell_thresholds,
            "pooled_count": [self.styles.count],
            "pooled_mean": self.styles.mean,
            "pooled_comoment": self.styles.comoment,
            "within_counts": [self.styles_within.count, self.styles_within.num_groups],
            "within_comoment": self.styles_within.comoment,
        }
        return {_PREFIX + name: np.asarray(array, np.float64) for name, array in arrays.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.float64]]) -> MonitorReference:
        """Return what `as_arrays` wrote; other arrays are left alone.

        Raises:
            KeyError: an array is missing.
            ValueError: an array has another shape.
        """
        found = {name.removeprefix(_PREFIX): np.asarray(array) for name, array in arrays.items()}
        signals = {
            name: SignalReference(*(float(number) for number in row))
            for name, row in zip((*MEANS, *SHARES), found["signals"].reshape(len(MEANS) + len(SHARES), 4), strict=True)
            if not np.isnan(row).any()
        }
        size = len(STYLE_COLUMNS)
        within_count, num_groups = (int(count) for count in found["within_counts"])
        return cls(
            Clusters(*(int(count) for count in found["clusters"])),
            signals,
            found["tell_thresholds"].reshape(len(TELLS)),
            Moments(
                int(found["pooled_count"][0]),
                found["pooled_mean"].reshape(size),
                found["pooled_comoment"].reshape(size, size),
            ),
            WithinMoments(within_count, num_groups, found["within_comoment"].reshape(size, size)),
        )


def fit_reference(items: ObservedItems) -> MonitorReference:
    """Measure every signal on calibrated items, scored at level ``full``.

    Raises:
        ValueError: rewards, lengths, surprises or tells are known of fewer than two items.
    """
    thresholds = np.quantile(items.known(*TELLS)[0], TELL_QUANTILE, axis=0, method="higher")
    statistics = summarize(items, thresholds)
    wanted = [name for name in (*MEANS, "flag") if name != "oe_surprise" or statistics.oe_surprises.count]
    signals = {name: _signal(items.known(name)) for name in wanted}
    for place, name in enumerate(TELLS):
        values, prompts = items.known(name)
        signals[name] = _signal(((values > thresholds[place]).astype(np.float64), prompts))
    return MonitorReference(
        statistics.clusters,
        {name: _smoothed(signal) if name in SHARES else signal for name, signal in signals.items()},
        thresholds,
        statistics.styles,
        statistics.styles_within,
    )


def intraclass_correlation(pooled: Moments, within: WithinMoments, clusters: Clusters, index: int = 0) -> float:
    """Return the correlation of two items of one prompt, from the one-way analysis of variance (Donner, 1986).

    0 where no prompt has two items, or nothing varies.
    """
    if clusters.prompts < 2 or clusters.items <= clusters.prompts:
        return 0.0
    between_freedom = clusters.prompts - 1
    mean_square_within = within.comoment[index, index] / (clusters.items - clusters.prompts)
    mean_square_between = (pooled.comoment[index, index] - within.comoment[index, index]) / between_freedom
    size = (clusters.items - clusters.squares / clusters.items) / between_freedom
    total = mean_square_between + (size - 1.0) * mean_square_within
    return float((mean_square_between - mean_square_within) / total) if total > 0 else 0.0


def _signal(known: tuple[NDArray[np.float64], NDArray[np.int64]]) -> SignalReference:
    values, prompts = known
    pooled, within, clusters = Moments.of(values), WithinMoments.of(values, prompts), Clusters.of(prompts)
    variance = pooled.variance(0)
    if variance is None:
        raise ValueError("A signal is known of fewer than two items.")
    intraclass = intraclass_correlation(pooled, within, clusters)
    return SignalReference(
        float(pooled.mean[0]), math.sqrt(variance), intraclass, clusters.items / clusters.design_effect(intraclass)
    )


def _smoothed(share: SignalReference) -> SignalReference:
    """Keep a share away from 0 and 1 (Krichevsky and Trofimov, 1981): what was never seen may still be clean."""
    mean = (share.mean * share.effective_size + 0.5) / (share.effective_size + 1.0)
    return SignalReference(mean, math.sqrt(mean * (1.0 - mean)), share.intraclass, share.effective_size)
