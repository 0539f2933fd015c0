"""Bets on the direction in which the next batch deviates, and the evidence that their gains are.

A bet on a shift of b standard errors multiplies its stake by exp(b z - b^2 / 2), the likelihood ratio of a normal mean.
Its expectation is 1 while nothing changes, and at most 1 for a skewed mean, by the third term of its cumulants. Stakes
restart at 1 (an e-detector of the CUSUM kind, Shin, Ramdas and Rinaldo, 2022, arXiv 2203.03532): their mean exceeds a
threshold at most once in as many batches on average, however the bets depend on each other.
"""

from __future__ import annotations

import math

import numpy as np

from service.diagnostics.monitors.drift_moments import MAX_Z, Matrix, Vector

BETS = np.array([0.25, 0.5, 1.0, 2.0])
"""Shifts that bets expect, in standard errors of a batch."""


class Bets:
    """The logarithms of the products of all bets of one comparison.

    Args:
        num_columns: statistics that are compared.
        num_directions: directions of the classifier; 0: single statistics only.
    """

    def __init__(self, num_columns: int, num_directions: int) -> None:
        self._single = np.zeros((2, len(BETS), num_columns))
        self._joint = np.zeros((num_directions, len(BETS)))

    def place(self, single: Matrix, skewness: Vector, joint: Vector) -> None:
        """Multiply by the factors of a batch.

        Args:
            single: deviation upwards and downwards of each statistic, in standard errors, [2, columns].
            skewness: of the deviations upwards, [columns].
            joint: deviation along each direction of the classifier, [directions].
        """
        signed = np.stack([skewness, -skewness])[:, None, :]
        bets = BETS[None, :, None]
        z = np.minimum(single, MAX_Z)[:, None, :]
        self._single = np.maximum(self._single, 0.0) + bets * z - bets**2 / 2 - bets**3 * np.maximum(signed, 0.0) / 6
        if len(self._joint):
            along = np.minimum(joint, MAX_Z)[:, None]
            self._joint = np.maximum(self._joint, 0.0) + BETS * along - BETS**2 / 2

    def log_evidence(self) -> float:
        """Return ln of the mean of the products; half of the weight is the classifier's, where there is one."""
        parts = [part.ravel() for part in (self._single, self._joint) if part.size]
        weights = np.concatenate([np.full(part.size, 1.0 / (part.size * len(parts))) for part in parts])
        logs = np.concatenate(parts)
        largest = float(logs.max())
        return largest + math.log(float(weights @ np.exp(logs - largest)))

    def gains(self) -> Matrix:
        """Return ln of the largest product of the bets on each statistic, upwards and downwards, [2, columns]."""
        return np.asarray(self._single.max(axis=1))
