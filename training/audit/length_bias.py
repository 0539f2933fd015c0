"""How much of the reward is length, over all completions and among the completions of one prompt.

Two alarms are in use, and they are not the same: |r| above 0.3, and r squared above 0.3, which is |r| above 0.548. Both
are judged by the lower end of the confidence interval, within prompts: pooled over prompts, length also stands for what
was asked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from training.audit.intervals import Interval, bootstrap_interval
from training.audit.scored_pairs import Completions, FloatArray, IntArray

WARN_R = 0.30
"""On |r|: length is worth looking at."""

CRITICAL_R_SQUARED = 0.30
"""On r squared, the share of the reward's variance that length explains: length is what the model measures."""


@dataclass(frozen=True, slots=True)
class LengthBias:
    """Correlations of reward with ln(1 + length).

    ``pearson``, ``spearman``: over all completions. ``within``: Pearson after the means of each prompt are subtracted.
    """

    pearson: Interval
    spearman: float
    within: Interval

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
        """The smallest |r| within prompts that the data allow; 0 where even its sign is open."""
        low, high = self.within.low, self.within.high
        return 0.0 if not low * high > 0 else min(abs(low), abs(high))

    @property
    def warns(self) -> bool:
        """Whether |r| is above 0.3, beyond doubt."""
        return self.least_within > WARN_R

    @property
    def is_critical(self) -> bool:
        """Whether r squared is above 0.3, beyond doubt."""
        return self.least_within**2 > CRITICAL_R_SQUARED


def measure_length_bias(completions: Completions) -> LengthBias:
    """Measure the correlations of reward and length."""
    rewards, lengths, prompts = completions.rewards, completions.log_lengths, completions.prompts
    inner_rewards, inner_lengths = centre(rewards, prompts), centre(lengths, prompts)
    return LengthBias(
        pearson=bootstrap_interval(lambda rows: correlation(rewards[rows], lengths[rows]), prompts),
        spearman=_spearman(rewards, lengths),
        within=bootstrap_interval(lambda rows: correlation(inner_rewards[rows], inner_lengths[rows]), prompts),
    )


def centre(values: FloatArray, prompts: IntArray) -> FloatArray:
    """Subtract from each value [completion] the mean of its prompt."""
    sums, counts = np.bincount(prompts, values), np.bincount(prompts)
    return np.asarray(values - (sums / counts)[prompts])


def correlation(left: FloatArray, right: FloatArray) -> float:
    """Return Pearson's r, and 0 where one of the two does not vary."""
    if len(left) < 2 or np.ptp(left) == 0 or np.ptp(right) == 0:
        return 0.0
    return float(np.corrcoef(left, right)[0, 1])


def _spearman(left: FloatArray, right: FloatArray) -> float:
    return 0.0 if np.ptp(left) == 0 or np.ptp(right) == 0 else float(spearmanr(left, right).statistic)
