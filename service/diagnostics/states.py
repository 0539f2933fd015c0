"""Statistics of the hidden states that the forward pass computed anyway.

The states of each tap are compared with the calibration's mean and leading principal axes at that tap; the detectors
read five numbers a tap. Runs in the engine's thread on a whole batch: two thin matrix products a tap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.conformal import Scores
from service.diagnostics.detectors import Matrix
from service.records import StateTap

PER_TAP = ("distance", "norm", "residual", "cosine", "length")
"""The statistics of one tap: ln of the squared Mahalanobis distance; ln of the squared distance from the mean; ln of
the part of it outside the leading axes; the cosine with the mean; ln of the state's norm."""

_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class StateForm:
    """The shrunk covariance of a tap's states in factored form: leading principal axes and one residual variance."""

    mean: NDArray[np.float32] = field(repr=False)
    """Mean state, float32 [hidden]."""

    axes: NDArray[np.float32] = field(repr=False)
    """Orthonormal leading axes, float32 [hidden, k]."""

    variances: NDArray[np.float32] = field(repr=False)
    """Variance along each axis after shrinkage, float32 [k]."""

    residual: float
    """Variance along every other direction after shrinkage."""

    @cached_property
    def _mean_norm(self) -> float:
        return float(np.linalg.norm(self.mean))

    def coordinates(self, states: NDArray[np.float32]) -> tuple[Matrix, Scores, Scores]:
        """Return, of states [items, hidden]: coordinates on the axes, squared distance from the mean, its residual."""
        centred = states - self.mean
        on_axes = (centred @ self.axes).astype(np.float64)
        squared = np.einsum("ij,ij->i", centred, centred, dtype=np.float64)
        rest = np.maximum(squared - np.einsum("ij,ij->i", on_axes, on_axes), 0.0)
        return on_axes, squared, rest

    def statistics(
        self, states: NDArray[np.float32], coordinates: tuple[Matrix, Scores, Scores] | None = None
    ) -> Matrix:
        """Return the numbers named in `PER_TAP`, float64 [items, 5]; NaN or infinite where a state is.

        Args:
            states: float32 [items, hidden].
            coordinates: of these states; None: computed here.
        """
        on_axes, squared, rest = coordinates or self.coordinates(states)
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


@dataclass(frozen=True, eq=False)
class LaplaceFactor:
    """Posterior uncertainty of the reward from the scalar head alone (last-layer Laplace, Daxberger et al., 2021).

    Large for states in directions in which the calibration's preference pairs hold little information.
    """

    form: StateForm = field(repr=False)
    """Axes of the tap that the head reads."""

    cholesky: Matrix = field(repr=False)
    """Lower Cholesky factor of ``prior I + sum of weighted differences`` on the axes, float64 [k, k]."""

    prior: float
    """Prior precision of the head's weights, per squared unit of reward."""

    @cached_property
    def _inverse(self) -> Matrix:
        return np.asarray(np.linalg.inv(self.cholesky), np.float64)

    def reward_std(
        self, states: NDArray[np.float32], coordinates: tuple[Matrix, Scores, Scores] | None = None
    ) -> Scores:
        """Return the standard deviation of the reward, in units of reward.

        Args:
            states: float32 [items, hidden].
            coordinates: of these states on the axes of ``form``; None: computed here.
        """
        on_axes, _, rest = coordinates or self.form.coordinates(states)
        whitened = on_axes @ self._inverse.T
        deviation: Scores = np.sqrt((whitened**2).sum(axis=1) + rest / self.prior)
        return deviation


@dataclass(frozen=True, slots=True, eq=False)
class StateReader:
    """Computes the statistics of a batch's states at all taps of a calibration."""

    taps: tuple[StateTap, ...]
    """In the order of the engine's states."""

    forms: Sequence[StateForm] = field(repr=False)
    """One for each tap."""

    laplace: LaplaceFactor | None = field(repr=False)
    """Gives the standard deviation of the reward; None where the calibration had no pairs of completions."""

    head_tap: int
    """Index among the taps of the state that the head reads."""

    def statistics(self, states: NDArray[np.float32]) -> Matrix:
        """Return the statistics of all taps, float64 [items, 5 x taps], for states [items, taps, hidden]."""
        return np.concatenate([form.statistics(states[:, tap]) for tap, form in enumerate(self.forms)], axis=1)

    def reward_std(self, states: NDArray[np.float32]) -> Scores | None:
        """Return the standard deviation of each reward, float64 [items]; None without a Laplace factor."""
        return None if self.laplace is None else self.laplace.reward_std(states[:, self.head_tap])

    def read(self, states: NDArray[np.float32]) -> tuple[Matrix, Scores | None]:
        """Return `statistics` and `reward_std`, for states [items, taps, hidden]; each tap is projected once."""
        coordinates = [form.coordinates(states[:, tap]) for tap, form in enumerate(self.forms)]
        statistics = np.concatenate(
            [form.statistics(states[:, tap], coordinates[tap]) for tap, form in enumerate(self.forms)], axis=1
        )
        if self.laplace is None:
            return statistics, None
        own = coordinates[self.head_tap] if self.laplace.form is self.forms[self.head_tap] else None
        return statistics, self.laplace.reward_std(states[:, self.head_tap], own)
