"""Disagreement between resampled heads: how much a reward depends on which preference pairs the head was fitted to.

A resampled head adds a linear function of the state that the served head reads to the served reward. Each one was
fitted by ``reward-calibrate`` to another resample of the preference pairs. Heads that agree on an item would have given
it the same reward whatever the sample; heads that disagree show that the pairs do not determine its reward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.conformal import Scores
from service.diagnostics.detectors import Matrix

_ARRAY = "resampled_heads"


@dataclass(frozen=True, slots=True, eq=False)
class ResampledHeads:
    """K heads on the state that the served head reads, as differences from the served head."""

    mean: NDArray[np.float32] = field(repr=False)
    """Mean state of the calibration, float32 [hidden]: there all heads give the served reward."""

    weights: NDArray[np.float32] = field(repr=False)
    """Weights of each head less those of the served one, float32 [hidden, K], K >= 2."""

    @property
    def num_heads(self) -> int:
        """K."""
        return int(self.weights.shape[1])

    def deviations(self, states: NDArray[np.float32]) -> Matrix:
        """Return the reward of each head less the served reward, float64 [items, K], for states [items, hidden]."""
        return np.asarray((states - self.mean) @ self.weights, np.float64)

    def as_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays of the calibration file; the mean is that of the head's tap, which the file has."""
        return {_ARRAY: self.weights}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], mean: NDArray[np.float32]) -> ResampledHeads | None:
        """Return the heads of a calibration file; None where it has none.

        Args:
            arrays: of the file.
            mean: mean state of the calibration at the tap that the served head reads.

        Raises:
            ValueError: the weights are of another hidden size.
        """
        weights = arrays.get(_ARRAY)
        if weights is None:
            return None
        if weights.ndim != 2 or len(weights) != len(mean) or weights.shape[1] < 2:
            raise ValueError(f"{_ARRAY} has the shape {weights.shape}")
        return cls(mean, weights)


def disagreement(deviations: Matrix) -> Scores:
    """Return the standard deviation over heads, with divisor K - 1; float64 [items].

    Args:
        deviations: of rewards, or of differences between rewards of one prompt, float64 [items, K].
    """
    spread: Scores = deviations.std(axis=1, ddof=1)
    return spread


def lower_reward(reward: float | None, spread: float | None, pessimism: float) -> float | None:
    """Return the reward less ``pessimism`` standard deviations; None where one of the two is unknown.

    The lower bound of arXiv 2602.24040, for pessimistic policy optimization as in arXiv 2403.05171. Coste et al. (arXiv
    2310.02743) take off the variance of an ensemble instead.
    """
    return None if reward is None or spread is None else reward - pessimism * spread
