"""The detectors: each turns statistics of items into one score an item, the higher the more unusual.

They hold what a calibration fitted and compute with it; what a score means is for ``conformal``. All are small arrays
and a few products, so a batch costs microseconds an item.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.conformal import Scores, TailMap
from service.diagnostics.text import STATISTICS

Matrix = NDArray[np.float64]

MAX_DEVIATION = 10.0
"""Standard deviations at which a statistic is clipped, so that one of them cannot outweigh all others."""

BANK = (
    ("bi", 1), ("bi", -1), ("uni", 1), ("uni", -1), ("zratio", 1), ("zratio", -1), ("rep4", 1), ("top4", 1),
    ("ttr", -1), ("nonascii", 1), ("punct", 1), ("punct", -1), ("wlen", 1), ("wlen", -1), ("md", 1), ("emoji", 1),
    ("hedge", 1), ("flattery", 1), ("overlap", 1), ("logtok", 1), ("logtok", -1), ("chars_tok", 1), ("chars_tok", -1),
    ("upper", 1),
)  # fmt: skip
"""The one-sided tests of single text statistics: name, and the direction that is unusual."""


class ShrunkGaussian:
    """Squared Mahalanobis distance of standardised statistics under a shrunk covariance (Ledoit and Wolf 2004).

    Args:
        columns: which statistics of an item it reads, int64 [q].
        mean: float64 [q].
        sd: float64 [q].
        precision: inverse of the shrunk covariance of the standardised statistics, float64 [q, q].
    """

    def __init__(self, columns: NDArray[np.int64], mean: Scores, sd: Scores, precision: Matrix) -> None:
        self.columns, self.mean, self.sd, self.precision = columns, mean, sd, precision

    def standardised(self, statistics: Matrix) -> Matrix:
        """Return its columns in standard deviations from the mean, clipped; float64 [items, q]."""
        deviations = (statistics[:, self.columns] - self.mean) / self.sd
        return np.clip(deviations, -MAX_DEVIATION, MAX_DEVIATION)

    def distance(self, statistics: Matrix) -> Scores:
        """Return the squared distance from the mean, float64 [items]."""
        return self._squared(self.standardised(statistics))

    def sibling_distance(self, statistics: Matrix) -> Scores:
        """Return the squared distance of each of n >= 2 siblings from the others.

        The deviation from the group's mean is scaled by sqrt(n / (n - 1)), so that its covariance is that of a single
        completion about its prompt's mean, whatever n is.
        """
        standardised = self.standardised(statistics)
        num = len(standardised)
        return self._squared(np.sqrt(num / (num - 1)) * (standardised - standardised.mean(axis=0)))

    def _squared(self, deviations: Matrix) -> Scores:
        squared: Scores = np.einsum("ij,jk,ik->i", deviations, self.precision, deviations, optimize=True)
        return squared


class TestBank:
    """One-sided tests of single text statistics; the score is the largest of their -ln p.

    Args:
        maps: one for each of `BANK`, of the statistic times its sign.
    """

    __test__ = False  # no test case, whatever pytest makes of the name

    def __init__(self, maps: Sequence[TailMap]) -> None:
        self.maps = maps
        self._columns = [STATISTICS.index(name) for name, _ in BANK]

    @classmethod
    def of(cls, statistics: Matrix) -> TestBank:
        """Fit the tests to the text statistics of reference items, float64 [items, 18 or more]."""
        return cls([TailMap.of_test(sign * statistics[:, STATISTICS.index(name)]) for name, sign in BANK])

    def surprises(self, statistics: Matrix) -> Matrix:
        """Return -ln p of every test, float64 [items, tests]."""
        return np.stack(
            [
                test(sign * statistics[:, column])
                for test, column, (_, sign) in zip(self.maps, self._columns, BANK, strict=True)
            ],
            axis=1,
        )


class TreeEnsemble:
    """Boosted trees: the sum of one leaf of each.

    Args:
        columns: which statistics of an item it reads, int64 [q].
        feature: column (within ``columns``) that a node asks about, int16 [trees, nodes].
        threshold: a node goes left where the value is at most this, float32 [trees, nodes].
        children: left and right child; a leaf is its own child, int16 [2, trees, nodes].
        value: what a leaf adds, float32 [trees, nodes].
        depth: steps from any root to its deepest leaf.
    """

    def __init__(
        self,
        columns: NDArray[np.int64],
        feature: NDArray[np.int16],
        threshold: NDArray[np.float32],
        children: NDArray[np.int16],
        value: NDArray[np.float32],
        depth: int,
    ) -> None:
        self.columns, self.feature, self.threshold = columns, feature, threshold
        self.children, self.value, self.depth = children, value, depth

    def score(self, statistics: Matrix) -> Scores:
        """Return the sum of the leaves that each item falls into, float64 [items]."""
        values = statistics[:, self.columns].astype(np.float32)
        items = np.arange(len(values))[:, None]
        trees = np.arange(len(self.feature))[None, :]
        nodes = np.zeros((len(values), len(self.feature)), np.int16)
        left, right = self.children
        for _ in range(self.depth):
            goes_left = values[items, self.feature[trees, nodes]] <= self.threshold[trees, nodes]
            nodes = np.where(goes_left, left[trees, nodes], right[trees, nodes])
        total: Scores = self.value[trees, nodes].sum(axis=1, dtype=np.float64)
        return total
