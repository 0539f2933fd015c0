"""Means and co-moments of vectors, which merge exactly, and what follows from them: correlations and slopes.

Pure arithmetic in double precision. Nothing is subtracted from a sum of squares, so the correlation of ten million
items whose mean is a million times their standard deviation stays accurate.
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
"""97.5 percent quantile of the standard normal distribution."""

MAX_CONDITION = 1e10
"""Condition number above which a correlation matrix counts as singular: the variables are linearly dependent."""


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Count, mean and co-moment of a set of vectors."""

    count: int

    mean: Vector
    """[d]"""

    comoment: Matrix
    """Sum of outer products of deviations from the mean, [d, d]."""

    @classmethod
    def empty(cls, size: int) -> Moments:
        """Return the moments of no vectors of that size: the neutral element of `merged`."""
        return cls(0, np.zeros(size), np.zeros((size, size)))

    @classmethod
    def of(cls, rows: Matrix) -> Moments:
        """Return the moments of rows [n, d], by the corrected two-pass algorithm."""
        if not len(rows):
            return cls.empty(rows.shape[1])
        mean = rows.mean(axis=0)
        deviations = rows - mean
        # The mean is rounded; the mean of the deviations is that rounding error.
        correction = deviations.mean(axis=0)
        deviations -= correction
        return cls(len(rows), mean + correction, deviations.T @ deviations)

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
    """Co-moments of vectors about the means of their groups; groups of one vector are left out."""

    count: int
    """Vectors in groups of two or more."""

    num_groups: int
    """Groups of two or more."""

    comoment: Matrix
    """Sum of outer products of deviations from the group's mean, [d, d]."""

    @classmethod
    def empty(cls, size: int) -> WithinMoments:
        """Return the co-moments of no groups."""
        return cls(0, 0, np.zeros((size, size)))

    @classmethod
    def of(cls, rows: Matrix, groups: NDArray[np.int64]) -> WithinMoments:
        """Return the co-moments of rows [n, d] about the means of their groups [n]; groups of one row are left out."""
        _, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        has_siblings = sizes[members] > 1
        if not has_siblings.any():
            return cls.empty(rows.shape[1])
        centered = centered_within(rows, members)[has_siblings]
        return cls(int(has_siblings.sum()), int((sizes > 1).sum()), centered.T @ centered)

    def merged(self, other: WithinMoments) -> WithinMoments:
        """Return the co-moments of both sets of groups, which have no group in common."""
        return WithinMoments(
            self.count + other.count, self.num_groups + other.num_groups, self.comoment + other.comoment
        )


def centered_within(rows: Matrix, members: NDArray[np.intp]) -> Matrix:
    """Subtract from each row [n, d] the mean of its group; ``members`` [n] numbers the groups from 0 on."""
    sizes = np.bincount(members).astype(np.float64)
    centered = rows.copy()
    for _ in range(2):  # the second pass removes the rounding error of a large mean
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
    """Return the 95 percent interval of a correlation (Fisher, 1921), or None where the data are too few.

    Args:
        r: the point estimate.
        size: effective number of pairs less three; the standard error of atanh(r) is 1 / sqrt(size).
    """
    if size <= 0:
        return None
    center, half_width = math.atanh(_below_one(r)), Z95 / math.sqrt(size)
    return math.tanh(center - half_width), math.tanh(center + half_width)


def lower_bound_of_size(r: float, size: float) -> float | None:
    """Return the lower bound of |r|: the end nearer to zero of its 95 percent interval, 0 where that contains zero."""
    interval = correlation_interval(abs(r), size)
    return None if interval is None else max(0.0, interval[0])


def _below_one(r: float) -> float:
    """Clip a correlation to the open interval (-1, 1), on which atanh is finite."""
    limit = math.nextafter(1.0, 0.0)
    return min(max(r, -limit), limit)


@dataclass(frozen=True, slots=True)
class Regression:
    """Least squares of one variable on others."""

    slopes: tuple[float | None, ...]
    """One for each regressor; None where the regressor does not vary."""

    r_squared: float
    """Share of the variance that the regressors explain together (coefficient of determination)."""


def regress(comoment: Matrix, target: int, regressors: Iterable[int]) -> Regression | None:
    """Regress one variable on others, all about their means.

    Returns:
        Slopes in the order of the regressors, in units of the target per unit of the regressor. None where the target
        does not vary, or the regressors that vary are linearly dependent.
    """
    indices = list(regressors)
    varying = [index for index in indices if comoment[index, index] > 0]
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
    return Regression(tuple(float(slopes[index]) if index in slopes else None for index in indices), explained)


def partial_correlation(comoment: Matrix, first: int, second: int, given: Iterable[int]) -> float | None:
    """Return the correlation of two variables with the others held fixed: -P12 / sqrt(P11 P22), P the inverse.

    None where one of the two does not vary, or the variables are linearly dependent. Given variables that do not vary
    are left out.
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
