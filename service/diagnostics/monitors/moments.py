"""Means and co-moments of vectors, which merge without loss, and what follows from them: correlations and slopes.

Pure arithmetic in double precision; nothing is ever subtracted from a sum of squares, so ten million items whose mean
is a million times their standard deviation keep their correlation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Vector: TypeAlias = NDArray[np.float64]
Matrix: TypeAlias = NDArray[np.float64]

Z95 = 1.959963984540054
"""Quantile of the standard normal distribution that leaves 2.5 percent above it."""

MAX_CONDITION = 1e10
"""Beyond it a correlation matrix is taken for singular: the variables say the same thing, so no slope is anybody's."""


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Count, mean [d] and co-moment [d, d] (sum of outer products of deviations from the mean) of some vectors."""

    count: int
    mean: Vector
    comoment: Matrix

    @classmethod
    def empty(cls, size: int) -> Moments:
        """Return the moments of no vector of that size; merging them changes nothing."""
        return cls(0, np.zeros(size), np.zeros((size, size)))

    @classmethod
    def of(cls, rows: Matrix) -> Moments:
        """Return the moments of rows [n, d], in two passes."""
        if not len(rows):
            return cls.empty(rows.shape[1])
        mean = rows.mean(axis=0)
        deviations = rows - mean
        # The mean itself is rounded; what is left of it in the deviations is put right (corrected two-pass algorithm).
        left = deviations.mean(axis=0)
        deviations -= left
        return cls(len(rows), mean + left, deviations.T @ deviations)

    def merged(self, other: Moments) -> Moments:
        """Return the moments of both sets of vectors (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        if not self.count or not other.count:
            return other if other.count else self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        comoment = self.comoment + other.comoment + np.outer(delta, delta) * (self.count * other.count / count)
        return Moments(count, mean, comoment)

    def variance(self, index: int) -> float | None:
        """Return the unbiased variance of one variable; None for fewer than two vectors."""
        return float(self.comoment[index, index]) / (self.count - 1) if self.count > 1 else None


@dataclass(frozen=True, slots=True, eq=False)
class WithinMoments:
    """Co-moments of vectors about the means of their groups. ``count``: vectors in groups of two or more."""

    count: int
    num_groups: int
    comoment: Matrix

    @classmethod
    def empty(cls, size: int) -> WithinMoments:
        """Return the co-moments of no group."""
        return cls(0, 0, np.zeros((size, size)))

    @classmethod
    def of(cls, rows: Matrix, groups: NDArray[np.int64]) -> WithinMoments:
        """Return the co-moments of rows [n, d] about the means of their groups [n]; lone rows are left out."""
        _, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        kept = sizes[members] > 1
        if not kept.any():
            return cls.empty(rows.shape[1])
        centered = centered_within(rows, members)[kept]
        return cls(int(kept.sum()), int((sizes > 1).sum()), centered.T @ centered)

    def merged(self, other: WithinMoments) -> WithinMoments:
        """Return the co-moments of both sets of groups, which have no group in common."""
        return WithinMoments(
            self.count + other.count, self.num_groups + other.num_groups, self.comoment + other.comoment
        )


def centered_within(rows: Matrix, members: NDArray[np.intp]) -> Matrix:
    """Subtract from each row [n, d] the mean of its group; ``members`` [n] numbers the groups from 0 on."""
    sizes = np.bincount(members).astype(np.float64)
    centered = rows.copy()
    for _ in range(2):  # the second round takes out what rounding left of a large mean
        sums = np.column_stack([np.bincount(members, weights=column) for column in centered.T])
        centered -= (sums / sizes[:, None])[members]
    return centered


def merge_moments(parts: Iterable[Moments], size: int) -> Moments:
    """Return the moments of all parts together."""
    total = Moments.empty(size)
    for part in parts:
        total = total.merged(part)
    return total


def pearson(comoment: Matrix, first: int = 0, second: int = 1) -> float | None:
    """Return the correlation of two variables, within [-1, 1]; None where one of them does not vary."""
    scale = math.sqrt(comoment[first, first]) * math.sqrt(comoment[second, second])
    if not scale > 0:
        return None
    return float(np.clip(comoment[first, second] / scale, -1.0, 1.0))


def correlation_interval(r: float, size: float) -> tuple[float, float] | None:
    """Return the 95 percent interval of a correlation (Fisher, 1921), or None where there is too little to tell.

    Args:
        r: the point estimate.
        size: effective number of pairs less three; the standard error of atanh(r) is its inverse root.
    """
    if size <= 0:
        return None
    center, reach = math.atanh(_inside(r)), Z95 / math.sqrt(size)
    return math.tanh(center - reach), math.tanh(center + reach)


def lower_bound_of_size(r: float, size: float) -> float | None:
    """Return the least |r| that the data allow at 95 percent: 0 where the interval crosses it."""
    interval = correlation_interval(abs(r), size)
    return None if interval is None else max(0.0, interval[0])


def _inside(r: float) -> float:
    """Keep atanh finite where a correlation is perfect."""
    limit = math.nextafter(1.0, 0.0)
    return min(max(r, -limit), limit)


@dataclass(frozen=True, slots=True)
class Regression:
    """Least squares of one variable on others: a slope for each (None where it does not vary), and R squared."""

    slopes: tuple[float | None, ...]
    r_squared: float


def regress(comoment: Matrix, target: int, regressors: Iterable[int]) -> Regression | None:
    """Regress one variable on others, all about their means.

    Returns:
        Slopes in the order of the regressors, in units of the target per unit of the regressor. None where the target
        does not vary, or the regressors that vary are linearly dependent.
    """
    wanted = list(regressors)
    varying = [index for index in wanted if comoment[index, index] > 0]
    if not varying or not comoment[target, target] > 0:
        return None
    scale = np.sqrt(np.diag(comoment))
    correlations = comoment[np.ix_(varying, varying)] / np.outer(scale[varying], scale[varying])
    if np.linalg.cond(correlations) > MAX_CONDITION:
        return None
    with_target = comoment[varying, target] / (scale[varying] * scale[target])
    weights = np.linalg.solve(correlations, with_target)
    slopes = dict(zip(varying, weights * scale[target] / scale[varying], strict=True))
    explained = float(np.clip(weights @ with_target, 0.0, 1.0))
    return Regression(tuple(float(slopes[index]) if index in slopes else None for index in wanted), explained)


def partial_correlation(comoment: Matrix, first: int, second: int, given: Iterable[int]) -> float | None:
    """Return the correlation of two variables with the others held fixed: -P12 / sqrt(P11 P22), P the inverse.

    None where one of the two does not vary, or the variables are linearly dependent; of those given, the ones that do
    not vary are left out.
    """
    used = [first, second, *(index for index in given if comoment[index, index] > 0)]
    scale = np.sqrt(np.diag(comoment)[used])
    if not scale[:2].all():
        return None
    correlations = comoment[np.ix_(used, used)] / np.outer(scale, scale)
    if np.linalg.cond(correlations) > MAX_CONDITION:
        return None
    precision = np.linalg.inv(correlations)
    return float(np.clip(-precision[0, 1] / math.sqrt(precision[0, 0] * precision[1, 1]), -1.0, 1.0))
