"""Correlation of reward and length, over all completions and among the completions of one prompt.

Two thresholds are in use, and they differ: |r| above 0.3, and r squared above 0.3, which is |r| above 0.548. Both are
compared with the lower end of the confidence interval within prompts: over all prompts, length is confounded with what
was asked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from service.diagnostics.correlation import pearson_correlation, spearman_correlation
from training.audit.intervals import Interval, bootstrap_interval
from training.audit.scored_pairs import Completions, FloatArray, IntArray

WARN_R = 0.30
"""Of |r|: length has an influence."""

CRITICAL_R_SQUARED = 0.30
"""Of r squared, the share of the reward's variance that length explains: the model mostly measures length."""


@dataclass(frozen=True, slots=True)
class LengthBias:
    """Correlations of reward with ln(1 + length)."""

    pearson: Interval
    """Over all completions."""

    spearman: float
    """Over all completions."""

    within: Interval
    """Pearson's after the mean of each prompt was subtracted from both."""

    @property
    def r_squared(self) -> float:
        """Share of the variance of rewards that length explains, over all completions."""
        return self.pearson.value**2

    @property
    def within_r_squared(self) -> float:
        """The same among completions of one prompt."""
        return self.within.value**2

    @property
    def least_within(self) -> float:
        """Smallest |r| in the confidence interval within prompts; 0 where the interval contains 0."""
        low, high = self.within.low, self.within.high
        return 0.0 if not low * high > 0 else min(abs(low), abs(high))

    @property
    def is_defined(self) -> bool:
        """Whether rewards and lengths vary within prompts; without that there is no correlation."""
        return not self.within.low == self.within.value == self.within.high == 0

    @property
    def is_excluded(self) -> bool:
        """Whether r squared within prompts is at most 0.3 on its whole confidence interval."""
        return max(abs(self.within.low), abs(self.within.high)) ** 2 <= CRITICAL_R_SQUARED

    @property
    def warns(self) -> bool:
        """Whether |r| is above 0.3, at the lower end of its confidence interval."""
        return self.least_within > WARN_R

    @property
    def is_critical(self) -> bool:
        """Whether r squared is above 0.3, at the lower end of its confidence interval."""
        return self.least_within**2 > CRITICAL_R_SQUARED


def measure_length_bias(completions: Completions) -> LengthBias:
    """Compute the correlations of reward and length."""
    rewards, lengths, prompts = completions.rewards, completions.log_lengths, completions.prompts
    inner_rewards, inner_lengths = centre(rewards, prompts), centre(lengths, prompts)
    return LengthBias(
        pearson=bootstrap_interval(lambda indices: _pearson(rewards[indices], lengths[indices]), prompts),
        spearman=_zero_if_undefined(spearman_correlation(rewards, lengths)),
        within=bootstrap_interval(lambda indices: _pearson(inner_rewards[indices], inner_lengths[indices]), prompts),
    )


def centre(values: FloatArray, prompts: IntArray) -> FloatArray:
    """Subtract from each value [completion] the mean of its prompt."""
    sums, counts = np.bincount(prompts, values), np.bincount(prompts)
    return np.asarray(values - (sums / counts)[prompts])


def _pearson(left: FloatArray, right: FloatArray) -> float:
    return _zero_if_undefined(pearson_correlation(left, right))


def _zero_if_undefined(correlation: float) -> float:
    """A reward that does not vary does not depend on length."""
    return 0.0 if math.isnan(correlation) else correlation
