"""Fits resampled heads to preference pairs: what the scalar head might have been with other pairs.

Each head minimises the Bradley-Terry loss of a resample of the prompts, and is drawn towards the served head with a
strength that is chosen by cross-validation over prompts. A head is represented by its difference from the served one,
a linear function of the state, so that heads of any form (deep ones, several outputs, exported graphs) are resampled
alike. Sources: bootstrap ensembles of linear heads on one body (AdvPO, arXiv 2403.05171, has the closed form of their
spread), random priors for directions that the pairs do not determine (Osband et al., arXiv 1806.03335), the Bayesian
bootstrap (Rubin, 1981).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from service.diagnostics.calibration_facts import HeadFacts
from service.diagnostics.conformal import Scores
from service.diagnostics.detectors import Matrix
from service.diagnostics.resampled_heads import ResampledHeads

NUM_HEADS = 32
MIN_PAIRS = 200
"""Preference pairs below which no heads are fitted."""

MAX_AXES = 64
MIN_PAIRS_PER_AXIS = 4
MIN_VARIANCE_SHARE = 1e-4
"""Share of the largest variance below which an axis is left out: a head must not hang on rounding errors."""

NUM_FOLDS = 5
PRIOR_SHARES = (0.1, 0.2, 0.4, 0.8, 1.6)
"""Standard deviation of the margin under the prior, as a share of that of the served margins."""


@dataclass(frozen=True, slots=True, eq=False)
class LabelledPairs:
    """The preference pairs that heads are fitted to."""

    differences: NDArray[np.float32] = field(repr=False)
    """State of the chosen less that of the rejected completion, float32 [pairs, hidden]."""

    margins: Scores = field(repr=False)
    """Served reward of the chosen less that of the rejected completion, float64 [pairs]."""

    prompts: NDArray[np.int64] = field(repr=False)
    """Number of each pair's prompt, int64 [pairs]."""

    def __len__(self) -> int:
        return len(self.margins)


def fit_resampled_heads(
    pairs: LabelledPairs, mean: NDArray[np.float32], seed: int
) -> tuple[ResampledHeads, HeadFacts] | None:
    """Fit the heads and say how; None for fewer than `MIN_PAIRS` pairs.

    Args:
        pairs: of prompts that the model was not trained on.
        mean: mean state of the calibration, float32 [hidden].
        seed: of folds and resamples.
    """
    if len(pairs) < MIN_PAIRS:
        return None
    axes = _axes_of(pairs.differences)
    coordinates = pairs.differences.astype(np.float64) @ axes
    scale = float(pairs.margins.std())
    gains = {share: _gain(coordinates, pairs, share * scale, seed) for share in PRIOR_SHARES}
    share = max(gains, key=lambda one: gains[one])
    rng = np.random.default_rng(seed)
    heads = np.stack([_resampled_head(coordinates, pairs, share * scale, rng) for _ in range(NUM_HEADS)], axis=1)
    facts = HeadFacts(num_heads=NUM_HEADS, num_pairs=len(pairs), prior_share=share, log_likelihood_gain=gains[share])
    return ResampledHeads(mean, (axes @ heads).astype(np.float32)), facts


def _axes_of(differences: NDArray[np.float32]) -> Matrix:
    """Return the leading principal axes of the differences, float64 [hidden, k].

    They are scaled so that a difference has coordinates of equal variance and a mean squared norm of 1.
    """
    num_pairs, hidden = differences.shape
    second_moment = differences.T.astype(np.float64) @ differences / num_pairs
    values, vectors = np.linalg.eigh(second_moment)
    num_varying = int((values >= MIN_VARIANCE_SHARE * values[-1]).sum())
    num_axes = max(1, min(MAX_AXES, num_pairs // MIN_PAIRS_PER_AXIS, num_varying))
    leading = slice(hidden - 1, hidden - 1 - num_axes if num_axes < hidden else None, -1)
    return np.asarray(vectors[:, leading] / np.sqrt(num_axes * np.maximum(values[leading], 1e-12)))


def _gain(coordinates: Matrix, pairs: LabelledPairs, prior_sd: float, seed: int) -> float:
    """Return what heads with this prior gain in log likelihood per pair of prompts that they were not fitted to."""
    _, members = np.unique(pairs.prompts, return_inverse=True)
    fold = (np.random.default_rng(seed).permutation(members.max() + 1) % NUM_FOLDS)[members]
    served = _log_likelihood(pairs.margins)
    gained = np.zeros(len(pairs))
    origin = np.zeros(coordinates.shape[1])
    for number in range(NUM_FOLDS):
        own = fold == number
        head = _fit(coordinates[~own], pairs.margins[~own], np.ones((~own).sum()), prior_sd, origin)
        gained[own] = _log_likelihood(pairs.margins[own] + coordinates[own] @ head) - served[own]
    return float(gained.mean())


def _resampled_head(coordinates: Matrix, pairs: LabelledPairs, prior_sd: float, rng: np.random.Generator) -> Scores:
    """Return the head of one resample: prompts with random weights, and a random prior mean."""
    _, members = np.unique(pairs.prompts, return_inverse=True)
    weights = rng.exponential(size=members.max() + 1)
    prior_mean = np.asarray(rng.normal(0.0, prior_sd, coordinates.shape[1]), np.float64)
    return _fit(coordinates, pairs.margins, (weights / weights.mean())[members], prior_sd, prior_mean)


def _fit(coordinates: Matrix, margins: Scores, weights: Scores, prior_sd: float, prior_mean: Scores) -> Scores:
    """Minimise ``sum weight * ln(1 + exp(-(margin + z h))) + |h - prior_mean|^2 / (2 prior_sd^2)``, which is convex."""
    precision = prior_sd**-2

    def loss_and_gradient(head: Scores) -> tuple[float, Scores]:
        fitted = margins + coordinates @ head
        from_prior = head - prior_mean
        loss = float(weights @ np.logaddexp(0.0, -fitted) + precision * (from_prior @ from_prior) / 2)
        return loss, precision * from_prior - coordinates.T @ (weights * expit(-fitted))

    return np.asarray(minimize(loss_and_gradient, np.zeros_like(prior_mean), jac=True, method="L-BFGS-B").x)


def _log_likelihood(margins: Scores) -> Scores:
    return np.asarray(-np.logaddexp(0.0, -margins))
