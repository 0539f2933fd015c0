"""The distribution of rewards and lengths over the calibration's items, and the reward that length alone predicts.

Plain arithmetic on quantiles and knots. The length-adjusted reward is reported in addition to the reward and never
replaces it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from service.diagnostics.conformal import Scores, thinned


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """The distribution of one quantity over the calibration's items."""

    mean: float
    sd: float
    """Standard deviation; positive."""

    quantiles: Scores = field(repr=False)
    """Sorted, from the smallest to the largest value seen."""

    @classmethod
    def of(cls, values: Scores) -> Reference:
        """Describe values, float64 [items]; they must vary."""
        return cls(float(values.mean()), float(values.std()), thinned(np.sort(values)))

    def z(self, value: float) -> float:
        """Return the distance from the mean in standard deviations."""
        return (value - self.mean) / self.sd

    def percentile(self, value: float) -> float:
        """Return the share of the reference at or below the value, 0 to 1."""
        return float(np.searchsorted(self.quantiles, value, side="right")) / len(self.quantiles)


@dataclass(frozen=True, slots=True, eq=False)
class LengthCurve:
    """The reward that length alone predicts: linear between knots over ln(1 + tokens), constant outside them.

    Knots over log length instead of a straight line, because length bias saturates (arXiv 2505.12843). Subtracting the
    curve corresponds to the LOWESS residual of arXiv 2409.17407. The curve is not constrained to rise: rewards may fall
    with length.
    """

    NUM_KNOTS: ClassVar[int] = 16

    x: Scores = field(repr=False)
    """ln(1 + completion tokens) of the knots, ascending."""

    y: Scores = field(repr=False)
    """Mean reward at each knot."""

    mean: float
    """Mean of the curve over the items that it was fitted to."""

    @classmethod
    def of(cls, log_lengths: Scores, rewards: Scores) -> LengthCurve:
        """Fit to items: means of up to 16 equal-count bins; interior ones are smoothed with weights 1/4, 1/2, 1/4."""
        order = np.argsort(log_lengths, kind="stable")
        edges = np.quantile(log_lengths, np.linspace(0, 1, cls.NUM_KNOTS + 1)[1:-1])
        bins = np.searchsorted(np.unique(edges), log_lengths[order], side="right")
        members = [order[bins == number] for number in np.unique(bins)]
        x = np.array([log_lengths[chosen].mean() for chosen in members])
        raw = np.array([rewards[chosen].mean() for chosen in members])
        y = raw.copy()
        y[1:-1] = (raw[:-2] + 2 * raw[1:-1] + raw[2:]) / 4
        return cls(x, y, float(np.interp(log_lengths, x, y).mean()))

    def adjusted(self, reward: float, num_completion_tokens: int) -> float:
        """Return the reward less what its length predicts, plus the mean of the curve."""
        return reward - float(np.interp(math.log1p(num_completion_tokens), self.x, self.y)) + self.mean
