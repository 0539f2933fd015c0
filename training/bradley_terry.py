"""The Bradley-Terry model of preferences in NumPy: probability, loss and gradient, safe in both tails.

Arrays in, arrays out, always float64; it knows neither texts nor models. Only the gap r_chosen - r_rejected enters, so
a constant added to all rewards changes nothing here, and no reward has a meaning alone.

Sources: Bradley and Terry 1952 (the model); Ouyang et al. 2022, equation 1 (its negative log-likelihood as a loss).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, log_expit


@dataclass(frozen=True, slots=True)
class BradleyTerryLoss:
    """The loss of some pairs, in nats: of each pair [pair], and its mean, which is NaN for no pairs at all."""

    mean: float
    per_pair: NDArray[np.float64]


def preference_probability(r_chosen: ArrayLike, r_rejected: ArrayLike) -> NDArray[np.float64]:
    """Return the probability sigma(r_chosen - r_rejected) that the first is preferred, for each pair."""
    return np.asarray(expit(_gap(r_chosen, r_rejected)))


def bradley_terry_loss(r_chosen: ArrayLike, r_rejected: ArrayLike) -> BradleyTerryLoss:
    """Return the negative log-likelihood -log sigma(r_chosen - r_rejected) of what people chose.

    A pair that the model puts the wrong way round by a gap g costs g to within rounding, however large g is, and one
    that it puts right costs e^-g, also where sigma itself rounds to 1. ``log(sigma + eps)`` fails at both ends: it is
    cut off at -log(eps) for the first and turns negative for the second.
    """
    per_pair = np.asarray(-log_expit(_gap(r_chosen, r_rejected)))
    return BradleyTerryLoss(float(per_pair.mean()) if per_pair.size else float("nan"), per_pair)


def bradley_terry_gradient(r_chosen: ArrayLike, r_rejected: ArrayLike) -> NDArray[np.float64]:
    """Return the derivative of each pair's loss by its chosen reward: sigma(r_chosen - r_rejected) - 1.

    By the rejected reward it is the same with the other sign. Never beyond 1 in size: a pair that the model has right
    pulls no longer, one that it has wrong pulls with full force but not more.
    """
    # Not probability - 1, which would round to 0 long before the pull of a pair is 0.
    return np.asarray(-expit(-_gap(r_chosen, r_rejected)))


def _gap(r_chosen: ArrayLike, r_rejected: ArrayLike) -> NDArray[np.float64]:
    gap = np.subtract(np.asarray(r_chosen, dtype=np.float64), np.asarray(r_rejected, dtype=np.float64))
    return np.asarray(gap, dtype=np.float64)
