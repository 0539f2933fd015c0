"""What can be said of an item by the hidden states that the forward pass computed anyway.

Each tap's states are compared with the calibration's mean and leading axes there; five numbers a tap are what the
detectors read. Runs in the engine's thread on a whole batch: two thin matrix products a tap.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.conformal import Scores
from service.diagnostics.detectors import Matrix
from service.records import StateTap

PER_TAP = ("distance", "norm", "residual", "cosine", "length")
"""The statistics of one tap: ln of the squared Mahalanobis distance, of the squared distance from the mean, and of what
the leading axes leave of it; the cosine with the mean; ln of the state's norm."""

_TINY = 1e-12


class StateForm:
    """The shrunk covariance of a tap's states in factor form (leading axes and one residual variance).

    Args:
        mean: float32 [hidden].
        axes: orthonormal, float32 [hidden, k].
        variances: along the axes, after shrinkage, float32 [k].
        residual: variance along every other direction, after shrinkage.
    """

    def __init__(
        self, mean: NDArray[np.float32], axes: NDArray[np.float32], variances: NDArray[np.float32], residual: float
    ) -> None:
        self.mean, self.axes, self.variances, self.residual = mean, axes, variances, residual
        self._mean_norm = float(np.linalg.norm(mean))

    def coordinates(self, states: NDArray[np.float32]) -> tuple[Matrix, Scores, Scores]:
        """Return of states [items, hidden]: coordinates on the axes, squared distance from the mean, and its rest."""
        centred = states - self.mean
        on_axes = (centred @ self.axes).astype(np.float64)
        squared = np.einsum("ij,ij->i", centred, centred, dtype=np.float64)
        rest = np.maximum(squared - np.einsum("ij,ij->i", on_axes, on_axes), 0.0)
        return on_axes, squared, rest

    def statistics(self, states: NDArray[np.float32]) -> Matrix:
        """Return the numbers named in `PER_TAP`, float64 [items, 5]; NaN or infinite where a state is."""
        on_axes, squared, rest = self.coordinates(states)
        distance = (on_axes**2 / self.variances).sum(axis=1) + rest / self.residual
        norm = np.sqrt(np.einsum("ij,ij->i", states, states, dtype=np.float64))
        cosine = (states @ self.mean) / (norm * self._mean_norm + _TINY)
        return np.stack(
            [
                np.log(distance + _TINY),
                np.log(squared + _TINY),
                np.log(rest + _TINY),
                cosine.astype(np.float64),
                np.log(norm + _TINY),
            ],
            axis=1,
        )


class LaplaceFactor:
    """How far a reward could be off because the head saw few preferences in a direction (last-layer Laplace).

    Args:
        form: axes of the tap that the head reads.
        cholesky: lower factor of ``prior I + sum of weighted differences`` on the axes, float64 [k, k].
        prior: precision of the head's weights before any preference was seen, per squared unit of reward.
    """

    def __init__(self, form: StateForm, cholesky: Matrix, prior: float) -> None:
        self.form, self.cholesky, self.prior = form, cholesky, prior
        self._inverse = np.linalg.inv(cholesky)

    def reward_std(self, states: NDArray[np.float32]) -> Scores:
        """Return the standard deviation of the reward, in its own units, for states [items, hidden]."""
        on_axes, _, rest = self.form.coordinates(states)
        whitened = on_axes @ self._inverse.T
        deviation: Scores = np.sqrt((whitened**2).sum(axis=1) + rest / self.prior)
        return deviation


class StateReader:
    """Reads the states of a batch at all taps of a calibration.

    Args:
        taps: in the order of the engine's states.
        forms: one for each tap.
        laplace: for the error bar of the reward; None where the calibration had no pairs.
        head_tap: place among the taps of the state that the head reads.
    """

    def __init__(
        self, taps: tuple[StateTap, ...], forms: Sequence[StateForm], laplace: LaplaceFactor | None, head_tap: int
    ) -> None:
        self.taps, self.forms, self.laplace, self.head_tap = taps, forms, laplace, head_tap

    def statistics(self, states: NDArray[np.float32]) -> Matrix:
        """Return the statistics of all taps, float64 [items, 5 x taps], for states [items, taps, hidden]."""
        return np.concatenate([form.statistics(states[:, tap]) for tap, form in enumerate(self.forms)], axis=1)

    def reward_std(self, states: NDArray[np.float32]) -> Scores | None:
        """Return the error bar of each reward, float64 [items]; None without a Laplace factor."""
        return None if self.laplace is None else self.laplace.reward_std(states[:, self.head_tap])
