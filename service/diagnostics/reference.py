"""Where a reward and a length stand among the calibration's, and what of a reward is owed to length alone.

Plain arithmetic on quantiles and knots. The adjusted reward stands beside the reward, never in its place.
"""

from __future__ import annotations

import math

import numpy as np

from service.diagnostics.conformal import Scores, thinned


class Reference:
    """The distribution of one quantity over the calibration's items.

    Args:
        mean: of the quantity.
        sd: its standard deviation; positive.
        quantiles: sorted, from the smallest to the largest value seen.
    """

    def __init__(self, mean: float, sd: float, quantiles: Scores) -> None:
        self.mean, self.sd, self.quantiles = mean, sd, quantiles

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


class LengthCurve:
    """The reward that length alone predicts: straight lines between knots over ln(1 + tokens), constant outside.

    Log-length knots and not a line, because the bias saturates (arXiv 2505.12843); the residual plays the part of the
    LOWESS residual of arXiv 2409.17407. Nothing makes the curve rise: rewards may fall with length.

    Args:
        x: ln(1 + completion tokens) of the knots, ascending.
        y: mean reward there.
        mean: of the curve over the items it was fitted to.
    """

    NUM_KNOTS = 16

    def __init__(self, x: Scores, y: Scores, mean: float) -> None:
        self.x, self.y, self.mean = x, y, mean

    @classmethod
    def of(cls, log_lengths: Scores, rewards: Scores) -> LengthCurve:
        """Fit to items: means of up to 16 equal-count bins, the interior ones smoothed by their neighbours."""
        order = np.argsort(log_lengths, kind="stable")
        edges = np.quantile(log_lengths, np.linspace(0, 1, cls.NUM_KNOTS + 1)[1:-1])
        bins = np.searchsorted(np.unique(edges), log_lengths[order], side="right")
        members = [order[bins == place] for place in np.unique(bins)]
        x = np.array([log_lengths[chosen].mean() for chosen in members])
        raw = np.array([rewards[chosen].mean() for chosen in members])
        y = raw.copy()
        y[1:-1] = (raw[:-2] + 2 * raw[1:-1] + raw[2:]) / 4
        return cls(x, y, float(np.interp(log_lengths, x, y).mean()))

    def flattened(self, share: float) -> LengthCurve:
        """Return the curve with its rises and falls reduced to a share of themselves; its mean stays."""
        return LengthCurve(self.x, self.mean + share * (self.y - self.mean), self.mean)

    def adjusted(self, reward: float, num_completion_tokens: int) -> float:
        """Return the reward less what its length predicts, plus what the mean length does."""
        return reward - float(np.interp(math.log1p(num_completion_tokens), self.x, self.y)) + self.mean
