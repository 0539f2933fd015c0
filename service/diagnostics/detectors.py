"""The detectors, but for the ``trees``: each maps statistics of items to one score an item; higher is more unusual.

They hold fitted parameters and evaluate them. Turning a score into a p-value is the job of ``conformal``. All of them
are small arrays and a few matrix products, so a batch costs microseconds an item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.conformal import Scores, TailMap, TailMaps
from service.diagnostics.text import STATISTICS

Matrix = NDArray[np.float64]

MAX_DEVIATION = 10.0
"""Standard deviations at which a statistic is clipped, so that one statistic cannot outweigh all others."""

ONE_SIDED_TESTS = (
    ("bi", 1), ("bi", -1), ("uni", 1), ("uni", -1), ("zratio", 1), ("zratio", -1), ("rep4", 1), ("top4", 1),
    ("ttr", -1), ("nonascii", 1), ("punct", 1), ("punct", -1), ("wlen", 1), ("wlen", -1), ("md", 1), ("emoji", 1),
    ("hedge", 1), ("flattery", 1), ("overlap", 1), ("logtok", 1), ("logtok", -1), ("chars_tok", 1), ("chars_tok", -1),
    ("upper", 1), ("bi_peak", 1), ("uni_peak", 1), ("copy3", 1), ("modal", 1), ("praise", 1), ("listed", 1),
    ("roles", 1), ("markup", 1),
)  # fmt: skip
"""The one-sided tests of single text statistics: name of the statistic, and the sign of the unusual direction."""

_TESTED = np.array([STATISTICS.index(name) for name, _ in ONE_SIDED_TESTS])
_SIGNS = np.array([float(sign) for _, sign in ONE_SIDED_TESTS])


@dataclass(frozen=True, slots=True, eq=False)
class ShrunkGaussian:
    """Squared Mahalanobis distance of standardised statistics under a shrunk covariance (Ledoit and Wolf, 2004)."""

    columns: NDArray[np.int64] = field(repr=False)
    """Indices of the statistics that it reads, int64 [q]."""

    mean: Scores = field(repr=False)
    """Mean of each of these statistics, float64 [q]."""

    sd: Scores = field(repr=False)
    """Standard deviation of each of these statistics, float64 [q]; positive."""

    precision: Matrix = field(repr=False)
    """Inverse of the shrunk covariance of the standardised statistics, float64 [q, q]."""

    def standardised(self, statistics: Matrix) -> Matrix:
        """Return its columns in standard deviations from the mean, clipped; float64 [items, q]."""
        deviations = (statistics[:, self.columns] - self.mean) / self.sd
        return np.clip(deviations, -MAX_DEVIATION, MAX_DEVIATION)

    def distance(self, statistics: Matrix) -> Scores:
        """Return the squared distance from the mean, float64 [items]."""
        return self._squared(self.standardised(statistics))

    def sibling_distance(self, statistics: Matrix) -> Scores:
        """Return the squared distance of each of n >= 2 completions of one prompt from the mean of the group.

        The deviation from the group's mean is scaled by sqrt(n / (n - 1)), so that its covariance is that of a single
        completion about its prompt's mean for every n.
        """
        standardised = self.standardised(statistics)
        num = len(standardised)
        return self._squared(np.sqrt(num / (num - 1)) * (standardised - standardised.mean(axis=0)))

    def _squared(self, deviations: Matrix) -> Scores:
        squared: Scores = np.vecdot((self.precision.T @ deviations.T).T, deviations)
        return squared


@dataclass(frozen=True, eq=False)
class OneSidedTests:
    """One-sided tests of single text statistics; an item's score is the largest of their -ln p."""

    maps: Sequence[TailMap] = field(repr=False)
    """One for each of `ONE_SIDED_TESTS`, fitted to the statistic times its sign."""

    @classmethod
    def of(cls, statistics: Matrix) -> OneSidedTests:
        """Fit the tests to the text statistics of reference items, float64 [items, statistics or more]."""
        return cls([TailMap.of_test(sign * statistics[:, STATISTICS.index(name)]) for name, sign in ONE_SIDED_TESTS])

    def surprises(self, statistics: Matrix) -> Matrix:
        """Return -ln p of every test, float64 [items, tests]."""
        return self._maps(statistics[:, _TESTED] * _SIGNS)

    @cached_property
    def _maps(self) -> TailMaps:
        return TailMaps(self.maps)
