"""The distribution of the monitored signals on the calibration's own items, from which drift is measured.

Fitted once by ``reward-calibrate``, on items that were scored through the serving path and whose prompts were used for
no other fit, and stored in its artifact as a few small arrays. The format of these arrays is defined here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.monitors.moments import Moments, WithinMoments
from service.diagnostics.monitors.observation import Column, ObservedItems
from service.diagnostics.monitors.window import STYLE_COLUMNS, STYLE_SIGNALS, Clusters, summarize

MEANS: tuple[Column, ...] = ("reward", "log_tokens", "surprise", "oe_surprise", "prompt_overlap")
"""Signals that are monitored by their mean."""

SHARES: tuple[Column, ...] = ("flag", *STYLE_SIGNALS)
"""Signals that are monitored by a share of items."""

STYLE_QUANTILE = 0.95
"""Quantile of a style signal above which an item counts as an exceedance."""

_PREFIX = "monitor_"


@dataclass(frozen=True, slots=True)
class SignalReference:
    """One signal on the reference items."""

    mean: float
    """Mean over items; of a signal of `SHARES`, the share."""

    sd: float
    """Standard deviation over items."""

    intraclass: float
    """Intraclass correlation: correlation of two items of one prompt."""

    effective_size: float
    """Number of independent items that would give the mean with the same standard error."""


_UNKNOWN = SignalReference(math.nan, math.nan, math.nan, math.nan)


@dataclass(frozen=True, slots=True, eq=False)
class MonitorReference:
    """The reference of all signals, and the co-moments from which its correlations and slopes follow."""

    clusters: Clusters

    signals: Mapping[Column, SignalReference]
    """Without ``oe_surprise`` where the calibration has no such detector."""

    style_thresholds: NDArray[np.float64]
    """The 95 percent quantile of each of `STYLE_SIGNALS`, [5]."""

    styles: Moments
    """Moments of `STYLE_COLUMNS`, over all items."""

    styles_within: WithinMoments
    """Co-moments of `STYLE_COLUMNS`, about the means of the prompts."""

    @property
    def correlation_intraclass(self) -> float:
        """Product of the intraclass correlations of reward and length, for the design effect of their correlation."""
        return max(0.0, self.signals["reward"].intraclass) * max(0.0, self.signals["log_tokens"].intraclass)

    @property
    def correlation_size(self) -> float:
        """Effective number of independent items behind the correlation of reward and length."""
        return self.clusters.items / self.clusters.design_effect(self.correlation_intraclass)

    def as_arrays(self) -> dict[str, NDArray[np.float64]]:
        """Return everything as float64 arrays, by their names in the artifact."""
        clusters = self.clusters
        named = [self.signals.get(name, _UNKNOWN) for name in (*MEANS, *SHARES)]
        arrays = {
            "clusters": [clusters.items, clusters.prompts, clusters.squares],
            "signals": [[signal.mean, signal.sd, signal.intraclass, signal.effective_size] for signal in named],
            "style_thresholds": self.style_thresholds,
            "pooled_count": [self.styles.count],
            "pooled_mean": self.styles.mean,
            "pooled_comoment": self.styles.comoment,
            "within_counts": [self.styles_within.count, self.styles_within.num_groups],
            "within_comoment": self.styles_within.comoment,
        }
        return {_PREFIX + name: np.asarray(array, np.float64) for name, array in arrays.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.float64]]) -> MonitorReference:
        """Return what `as_arrays` wrote; other arrays are ignored.

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
            found["style_thresholds"].reshape(len(STYLE_SIGNALS)),
            Moments(
                int(found["pooled_count"][0]),
                found["pooled_mean"].reshape(size),
                found["pooled_comoment"].reshape(size, size),
            ),
            WithinMoments(within_count, num_groups, found["within_comoment"].reshape(size, size)),
        )


def fit_reference(items: ObservedItems) -> MonitorReference:
    """Fit the reference of every signal to calibrated items that were scored at level ``full``.

    Raises:
        ValueError: rewards, lengths, surprises or styles are known for fewer than two items.
    """
    thresholds = np.quantile(items.known(*STYLE_SIGNALS)[0], STYLE_QUANTILE, axis=0, method="higher")
    statistics = summarize(items, thresholds)
    measured = [name for name in (*MEANS, "flag") if name != "oe_surprise" or statistics.oe_surprises.count]
    signals = {name: _signal(items.known(name)) for name in measured}
    for index, name in enumerate(STYLE_SIGNALS):
        values, prompts = items.known(name)
        signals[name] = _signal(((values > thresholds[index]).astype(np.float64), prompts))
    return MonitorReference(
        statistics.clusters,
        {name: _smoothed(signal) if name in SHARES else signal for name, signal in signals.items()},
        thresholds,
        statistics.styles,
        statistics.styles_within,
    )


def intraclass_correlation(pooled: Moments, within: WithinMoments, clusters: Clusters, index: int = 0) -> float:
    """Return the intraclass correlation, estimated by one-way analysis of variance (Donner, 1986).

    0 where no prompt has two items, or where nothing varies.
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
        raise ValueError("A signal is known for fewer than two items.")
    intraclass = intraclass_correlation(pooled, within, clusters)
    return SignalReference(
        float(pooled.mean[0]), math.sqrt(variance), intraclass, clusters.items / clusters.design_effect(intraclass)
    )


def _smoothed(share: SignalReference) -> SignalReference:
    """Move a share away from 0 and 1 (Krichevsky and Trofimov, 1981): a rate of zero would make any item an alarm."""
    mean = (share.mean * share.effective_size + 0.5) / (share.effective_size + 1.0)
    return SignalReference(mean, math.sqrt(mean * (1.0 - mean)), share.intraclass, share.effective_size)
