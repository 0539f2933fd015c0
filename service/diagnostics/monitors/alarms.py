"""The drift alarms: one cumulative sum a signal against the reference; and the correlation of reward and length.

Pure. A batch of the stream gives a standardised step for every signal that is known in it; steps update the sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from scipy.special import bdtr, bdtrc, ndtri

from service.diagnostics.monitors.cusum import ALLOWANCE, Cusum
from service.diagnostics.monitors.moments import Z95, lower_bound_of_size, pearson
from service.diagnostics.monitors.observation import Column
from service.diagnostics.monitors.reference import MEANS, SHARES, MonitorReference, SignalReference
from service.diagnostics.monitors.window import STYLE_SIGNALS, WindowStatistics
from service.records import Scope

CORRELATION = "reward_length_corr"
SIGNALS: tuple[str, ...] = (*MEANS, *SHARES, CORRELATION)
"""The signals of the cumulative sums."""

MAX_Z = 8.0
"""Limit of a batch's step in standard errors: one unusual request alone is not drift."""


@dataclass(frozen=True, slots=True)
class Step:
    """The step of one signal in one batch."""

    z: float
    """Deviation from the reference, in standard errors of the batch."""

    allowance: float
    """What is subtracted before the step is added to the sum, in the same unit (k of a CUSUM chart)."""


def steps_of(batch: WindowStatistics, reference: MonitorReference) -> dict[str, Step]:
    """Return a step for each signal that is known in the batch.

    The reference is measured on finitely many items. Its error is the same in every batch, so a sum would accumulate
    it: the allowance is raised by the limit of that error, at 97.5 percent on either side.
    """
    steps: dict[str, Step | None] = {name: _step_of_mean(name, batch, reference) for name in MEANS}
    steps |= {name: _step_of_share(name, batch, reference) for name in SHARES}
    steps[CORRELATION] = _step_of_correlation(batch, reference)
    return {name: step for name, step in steps.items() if step is not None}


def stepped(sums: Mapping[str, Cusum], steps: Mapping[str, Step], threshold: float) -> dict[str, Cusum]:
    """Return the sums after the steps; a signal without a step is unchanged."""
    return {
        name: sums[name].stepped(steps[name].z, threshold, steps[name].allowance) if name in steps else sums[name]
        for name in sums
    }


def _step_of_mean(name: Column, batch: WindowStatistics, reference: MonitorReference) -> Step | None:
    moments, index = {
        "reward": (batch.rewards, 0),
        "log_tokens": (batch.lengths, 1),
        "surprise": (batch.surprises, 0),
        "oe_surprise": (batch.oe_surprises, 0),
        "prompt_overlap": (batch.overlaps, 0),
    }[name]
    signal = reference.signals.get(name)
    if signal is None or not moments.count or not signal.sd > 0:
        return None
    size = moments.count / batch.clusters.design_effect(signal.intraclass)
    return _step((float(moments.mean[index]) - signal.mean) / signal.sd * math.sqrt(size), size, signal)


def _step_of_share(name: Column, batch: WindowStatistics, reference: MonitorReference) -> Step | None:
    count, total = _share(name, batch)
    if not total:
        return None
    signal = reference.signals[name]
    effect = batch.clusters.design_effect(signal.intraclass)
    return _step(_normal_score(count, total, signal.mean) / math.sqrt(effect), total / effect, signal)


def _step_of_correlation(batch: WindowStatistics, reference: MonitorReference) -> Step | None:
    r, expected = pearson(batch.lengths.comoment), pearson(reference.styles.comoment)
    size = batch.lengths.count / batch.clusters.design_effect(reference.correlation_intraclass) - 3.0
    if r is None or expected is None or size <= 0:
        return None
    limit = math.nextafter(1.0, 0.0)
    difference = math.atanh(max(-limit, min(r, limit))) - math.atanh(max(-limit, min(expected, limit)))
    return Step(_capped(difference * math.sqrt(size)), ALLOWANCE + Z95 * math.sqrt(size / reference.correlation_size))


def _step(z: float, size: float, signal: SignalReference) -> Step:
    return Step(_capped(z), ALLOWANCE + Z95 * math.sqrt(size / signal.effective_size))


def _share(name: Column, batch: WindowStatistics) -> tuple[int, int]:
    if name == "flag":
        return batch.num_flagged, batch.num_with_ood
    index = STYLE_SIGNALS.index(name)
    return batch.style_exceedances[index], batch.num_styled[index]


def _normal_score(count: int, total: int, share: float) -> float:
    """Return the normal quantile of a binomial count's mid-p value (Lancaster, 1961).

    The count of a rare style is far from normal; standardised by mean and variance, two hits by chance would raise an
    alarm.
    """
    more, fewer = float(bdtrc(count, total, share)), float(bdtr(count - 1, total, share)) if count else 0.0
    half = max(0.0, 1.0 - more - fewer) / 2
    return float(-ndtri(more + half)) if more < fewer else float(ndtri(fewer + half))


def _capped(z: float) -> float:
    return max(-MAX_Z, min(z, MAX_Z))


@dataclass(frozen=True, slots=True)
class LengthCorrelation:
    """The correlation of reward and log length with its uncertainty; None where the data are too few."""

    n: int
    """Number of items."""

    r: float | None
    """Pearson correlation."""

    size: float
    """Effective sample size less the estimated parameters; the standard error of atanh(r) is 1 / sqrt(size)."""

    bound: float | None
    """Lower bound of |r|: the end nearer to zero of its 95 percent interval."""


def length_correlation(statistics: WindowStatistics, scope: Scope, intraclass: float) -> LengthCorrelation:
    """Return the correlation, pooled or about the means of the prompts.

    Args:
        statistics: statistics of a window.
        scope: ``within`` removes that some prompts have longer and better answers; its size is n - groups - 2.
        intraclass: product of the intraclass correlations of reward and length, for the effective size when pooled.
    """
    if scope == "within":
        within = statistics.lengths_within
        r, n, size = pearson(within.comoment), within.count, float(within.count - within.num_groups - 2)
    else:
        n = statistics.lengths.count
        r, size = pearson(statistics.lengths.comoment), n / statistics.clusters.design_effect(intraclass) - 3.0
    return LengthCorrelation(n, r, size, None if r is None else lower_bound_of_size(r, size))
