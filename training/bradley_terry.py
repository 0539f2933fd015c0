"""The Bradley-Terry model of preferences in NumPy: probability, loss and gradient, exact in both tails.

Pure functions of float64 arrays. Only the gap r_chosen - r_rejected matters, so that a constant added to all rewards
changes nothing, and a single reward has no meaning.

Sources: Bradley and Terry 1952 (the model); Ouyang et al. 2022, equation 1 (its negative log-likelihood as a loss).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, log_expit


@dataclass(frozen=True, slots=True)
class BradleyTerryLoss:
    """The loss of pairs, in nats."""

    mean: float
    """Mean over the pairs; NaN for no pairs."""

    per_pair: NDArray[np.float64]
    """float64 [pair]."""


def preference_probability(r_chosen: ArrayLike, r_rejected: ArrayLike) -> NDArray[np.float64]:
    """Return the probability sigma(r_chosen - r_rejected) that the chosen completion is preferred, float64 [pair]."""
    return np.asarray(expit(_gap(r_chosen, r_rejected)))


def bradley_terry_loss(r_chosen: ArrayLike, r_rejected: ArrayLike) -> BradleyTerryLoss:
    """Return the negative log-likelihood -log sigma(r_chosen - r_rejected) of the choices.

    The loss of a pair with a gap of -g is g up to rounding, and that of a pair with a gap of g is e^-g, for large g in
    both cases, also where sigma itself rounds to 1. ``log(sigma + eps)`` would be limited to -log(eps) in the first
    case and negative in the second.
    """
    per_pair = np.asarray(-log_expit(_gap(r_chosen, r_rejected)))
    return BradleyTerryLoss(float(per_pair.mean()) if per_pair.size else float("nan"), per_pair)


def bradley_terry_gradient(r_chosen: ArrayLike, r_rejected: ArrayLike) -> NDArray[np.float64]:
    """Return the derivative of each pair's loss by its chosen reward: sigma(r_chosen - r_rejected) - 1, float64 [pair].

    The derivative by the rejected reward has the opposite sign. Its magnitude is at most 1: near 0 for a pair that is
    clearly right, near 1 for one that is clearly wrong.
    """
    # Not probability - 1, which rounds to 0 long before the gradient does.
    return np.asarray(-expit(-_gap(r_chosen, r_rejected)))


def _gap(r_chosen: ArrayLike, r_rejected: ArrayLike) -> NDArray[np.float64]:
    gap = np.subtract(np.asarray(r_chosen, dtype=np.float64), np.asarray(r_rejected, dtype=np.float64))
    return np.asarray(gap, dtype=np.float64)
