"""Moments of what the drift monitor compares: of a batch, of many, and how the mean of a batch varies.

Pure. Means merge exactly, over batches and over replicas.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

RIDGE = 0.2
"""Share of the identity in the correlation matrix by which the classifier is whitened."""

MAX_Z = 4.0
"""Limit of a batch's deviation in standard errors: one unusual request alone is not drift."""


@dataclass(frozen=True, slots=True, eq=False)
class BatchMoments:
    """The moments of one batch. Values that are unknown (NaN) count for no column."""

    counts: Vector
    """Known values of each column, [columns]."""

    means: Vector
    """[columns]; 0 where nothing is known."""

    scatter: Matrix
    """Sum over prompts of the products of their summed deviations, [columns, columns]: the covariance of the mean times
    the squared number of items, however the items are clustered by prompt."""

    third: Vector
    """Sum over prompts of the cubes of their summed deviations, [columns]."""

    @classmethod
    def of(cls, values: Matrix, prompts: NDArray[np.int64], lent: Matrix | None = None) -> BatchMoments:
        """Return the moments of items.

        Args:
            values: [n, columns], NaN where unknown.
            prompts: number of the prompt of each, from 0, all of which occur, [n].
            lent: what a prompt adds to the values of the others, [prompts, columns]; None: nothing.
        """
        known = ~np.isnan(values)
        counts = known.sum(axis=0).astype(np.float64)
        means = np.where(known, values, 0.0).sum(axis=0) / np.maximum(counts, 1.0)
        deviations = np.where(known, values - means, 0.0)
        sums = np.zeros((int(prompts.max(initial=-1)) + 1, values.shape[1]))
        np.add.at(sums, prompts, deviations)
        if lent is not None and len(lent):
            sums += lent - lent.mean(axis=0)
        return cls(counts, means, sums.T @ sums, (sums**3).sum(axis=0))


@dataclass(frozen=True, slots=True, eq=False)
class Means:
    """The mean of some batches, which merges exactly."""

    counts: Vector
    sums: Vector

    @classmethod
    def none(cls, num_columns: int) -> Means:
        """Return the mean of no item."""
        return cls(np.zeros(num_columns), np.zeros(num_columns))

    @classmethod
    def of(cls, batch: BatchMoments) -> Means:
        """Return the mean of a batch."""
        return cls(batch.counts, batch.counts * batch.means)

    def merged(self, other: Means) -> Means:
        """Return the mean of both."""
        return Means(self.counts + other.counts, self.sums + other.sums)

    @property
    def values(self) -> Vector:
        """The mean of each column; 0 where nothing is known."""
        return np.asarray(self.sums / np.maximum(self.counts, 1.0))


@dataclass(slots=True, eq=False)
class Spread:
    """How the mean of a batch varies, learned from the batches so far."""

    counts: Vector
    scatter: Matrix
    third: Vector

    differences: Vector
    """Sums of squared standardised differences of successive batches: more than 1 each, if batches vary more than their
    prompts explain. A slow drift does not change them (von Neumann, 1941)."""

    num_differences: Vector

    @classmethod
    def none(cls, num_columns: int) -> Spread:
        """Return that of no batch."""
        zeros = np.zeros(num_columns)
        return cls(zeros, np.zeros((num_columns, num_columns)), zeros, zeros.copy(), zeros.copy())

    def variances(self, scarce: Vector) -> Vector:
        """Return the variance of a mean times its number of items, [columns]; 0 for a column that never varied."""
        return np.asarray((np.diag(self.scatter) + scarce**2) / np.maximum(self.counts, 1.0))

    def skewness(self, scarce: Vector) -> Vector:
        """Return the skewness of a mean times the square root of its number of items, [columns]."""
        variances = self.variances(scarce)
        cubes = (self.third + scarce**3) / np.maximum(self.counts, 1.0)
        return np.divide(cubes, variances**1.5, out=np.zeros_like(cubes), where=variances > 0)

    def excess(self) -> Vector:
        """Return the factor by which batches vary more than their prompts explain, at least 1, [columns]."""
        return np.maximum(1.0, (self.differences + 8.0) / (self.num_differences + 8.0))

    def correlations(self) -> Matrix:
        """Return the correlation matrix of the columns, shrunk towards the identity."""
        deviations = np.sqrt(np.diag(self.scatter))
        scale = np.divide(1.0, deviations, out=np.zeros_like(deviations), where=deviations > 0)
        found = (1.0 - RIDGE) * self.scatter * np.outer(scale, scale)
        np.fill_diagonal(found, 1.0)
        return np.asarray(found)

    def add(self, batch: BatchMoments, previous: BatchMoments | None, scarce: Vector) -> None:
        """Learn from a batch and the one before it."""
        if previous is not None:
            variances = self.variances(scarce)
            both = (batch.counts > 0) & (previous.counts > 0) & (variances > 0)
            inverse = 1.0 / np.maximum(batch.counts, 1.0) + 1.0 / np.maximum(previous.counts, 1.0)
            squares = (batch.means - previous.means) ** 2 / np.where(both, variances * inverse, 1.0)
            self.differences += np.where(both, np.minimum(squares, 2 * MAX_Z**2), 0.0)
            self.num_differences += both
        self.counts = self.counts + batch.counts
        self.scatter = self.scatter + batch.scatter
        self.third = self.third + batch.third


def standardised(found: Means, means: Vector, counts: Vector, variances: Vector) -> Vector:
    """Return the difference of two means in standard errors, [columns]; 0 where one is unknown or nothing varies.

    Args:
        found: of some batches.
        means: what they are compared with, [columns].
        counts: items behind these means, [columns]; infinite where they are exact, 0 where they are unknown.
        variances: variance of a mean times its number of items, [columns].
    """
    known = (found.counts > 0) & (counts > 0) & (variances > 0)
    inverse = 1.0 / np.maximum(found.counts, 1.0) + 1.0 / np.maximum(counts, 1.0)
    differences = np.where(known, found.values - means, 0.0)
    return np.asarray(differences / np.sqrt(np.where(known, variances * inverse, 1.0)))
