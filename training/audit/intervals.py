"""Estimates with their 95 percent confidence intervals.

Pairs of one prompt are not independent, so the bootstrap resamples prompts, not pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from statsmodels.stats.proportion import proportion_confint

from training.audit.scored_pairs import FloatArray, IntArray

NUM_RESAMPLES = 1000
SEED = 0


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 percent confidence interval; all NaN where there are no data."""

    value: float
    low: float
    high: float

    def lies_in(self, low: float, high: float) -> bool:
        """Whether the whole interval lies in a range, its ends included; an interval of NaN does not."""
        return low <= self.low and self.high <= high

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} ({self.low:{spec}} to {self.high:{spec}})"


def significant(value: float) -> str:
    """Format a figure of arbitrary scale with three significant digits: 0.00124, 0.500, 12.3."""
    return f"{value:#.3g}".removesuffix(".")


def significant_interval(estimate: Interval) -> str:
    """Format an estimate of arbitrary scale and its interval with three significant digits each."""
    return f"{significant(estimate.value)} ({significant(estimate.low)} to {significant(estimate.high)})"


def share_interval(wins: FloatArray, prompts: IntArray) -> Interval:
    """Return the mean of ``wins`` [pair] (1, 0, or one half for a tie) with its interval.

    Wilson's score interval (Wilson 1927) where all prompts are different, else a bootstrap interval over prompts.
    """
    if not len(wins):
        return Interval(np.nan, np.nan, np.nan)
    if len(np.unique(prompts)) == len(prompts):
        low, high = proportion_confint(float(wins.sum()), len(wins), method="wilson")
        return Interval(float(wins.mean()), float(low), float(high))
    return bootstrap_interval(lambda indices: float(wins[indices].mean()), prompts)


def bootstrap_interval(statistic: Callable[[IntArray], float], prompts: IntArray) -> Interval:
    """Return a statistic with its percentile bootstrap interval over prompts (Efron 1979; Davison and Hinkley 1997).

    Args:
        statistic: a function of indices into the data, in any order and with repetitions.
        prompts: the prompt's number [index].
    """
    resampled = [statistic(indices) for indices in _resamples(prompts)]
    finite = [value for value in resampled if np.isfinite(value)]
    low, high = np.quantile(finite, (0.025, 0.975)) if finite else (np.nan, np.nan)
    return Interval(statistic(np.arange(len(prompts))), float(low), float(high))


def _resamples(prompts: IntArray) -> Iterator[IntArray]:
    """Yield the indices of as many prompts as there are, drawn with replacement; equal for equal ``prompts``."""
    order = np.argsort(prompts, kind="stable")
    _, starts, sizes = np.unique(prompts[order], return_index=True, return_counts=True)
    rng = np.random.default_rng(SEED)
    for _ in range(NUM_RESAMPLES):
        draw = rng.integers(len(starts), size=len(starts))
        drawn_sizes = sizes[draw]
        ends = np.cumsum(drawn_sizes)
        yield order[np.arange(ends[-1]) + np.repeat(starts[draw] - (ends - drawn_sizes), drawn_sizes)]
