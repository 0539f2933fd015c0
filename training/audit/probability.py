"""Whether the Bradley-Terry probability can be taken at its word: of pairs called 70 percent sure, are 70 right?

Gaps of rewards in, numbers out. Accuracy looks at the sign of a gap only; its size is what a policy is trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit

from training.audit.accuracy import wins_of
from training.audit.intervals import Interval, share_interval
from training.audit.scored_pairs import FloatArray, IntArray, ScoredPairs
from training.bradley_terry import bradley_terry_loss

NUM_BINS = 10
NUM_FOLDS = 5
NUM_DRAWS = 500
SEED = 0
TEMPERATURES = (0.02, 50.0)
"""Where the best temperature is looked for; a model at chance wants an infinite one."""


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Pairs about whose winner the model was about equally sure: its mean probability, and how often it was right."""

    num_pairs: int
    confidence: float
    accuracy: Interval


@dataclass(frozen=True, slots=True)
class Probability:
    """How honest the probabilities sigma(gap) are.

    ``loss``: mean Bradley-Terry loss in nats; a coin has 0.693. ``ece``: expected calibration error (Naeini et al.
    2015), the mean distance of confidence and accuracy over the bins. ``honest_ece``: what it stays below in 95 of 100
    draws if every probability is exact, since few pairs in a bin never agree perfectly. ``temperature``: the T for
    which sigma(gap / T) has the lowest loss on these pairs (Guo et al. 2017); above 1 the model is too sure.
    ``loss_at_temperature``, ``ece_at_temperature``: with a T that was fitted on other prompts (5 folds).
    """

    bins: Sequence[ReliabilityBin]
    loss: float
    ece: float
    honest_ece: float
    temperature: float
    loss_at_temperature: float
    ece_at_temperature: float

    @property
    def is_honest(self) -> bool:
        """Whether the probabilities are as good as exact ones, as far as these pairs can tell."""
        return self.ece <= self.honest_ece


def measure_probability(scored: ScoredPairs) -> Probability:
    """Measure reliability, and what one temperature would mend."""
    gaps, prompts = scored.gaps, scored.prompts
    tempered = gaps / _temperatures_of_other_folds(gaps, prompts)
    return Probability(
        bins=_reliability(gaps, prompts),
        loss=_loss(gaps),
        ece=expected_calibration_error(gaps),
        honest_ece=_honest_ece(gaps),
        temperature=fit_temperature(gaps),
        loss_at_temperature=_loss(tempered),
        ece_at_temperature=expected_calibration_error(tempered),
    )


def fit_temperature(gaps: FloatArray) -> float:
    """Return the temperature with the lowest loss within ``TEMPERATURES``."""
    if not len(gaps):
        return 1.0
    found = minimize_scalar(
        lambda log_temperature: _loss(gaps / np.exp(log_temperature)), bounds=np.log(TEMPERATURES), method="bounded"
    )
    return float(np.exp(found.x))


def expected_calibration_error(gaps: FloatArray) -> float:
    """Return the mean over pairs of |accuracy - confidence| of their bin; NaN for no pairs."""
    if not len(gaps):
        return float("nan")
    confidence, right, bins = _confidence(gaps), wins_of(gaps), _bins_of(gaps)
    differences = [abs((right - confidence)[bins == number].sum()) for number in np.unique(bins)]
    return float(sum(differences) / len(gaps))


def _honest_ece(gaps: FloatArray) -> float:
    """The 95 percent quantile of the calibration error when each pair is right with just the stated probability."""
    confidence, bins = _confidence(gaps), _bins_of(gaps)
    rng = np.random.default_rng(SEED)
    errors = []
    for _ in range(NUM_DRAWS):
        excess = (rng.random(len(gaps)) < confidence) - confidence
        errors.append(np.abs(np.bincount(bins, excess)).sum() / len(gaps))
    return float(np.quantile(errors, 0.95))


def _reliability(gaps: FloatArray, prompts: IntArray) -> list[ReliabilityBin]:
    confidence, right, bins = _confidence(gaps), wins_of(gaps), _bins_of(gaps)
    return [
        ReliabilityBin(
            num_pairs=int((bins == number).sum()),
            confidence=float(confidence[bins == number].mean()),
            accuracy=share_interval(right[bins == number], prompts[bins == number]),
        )
        for number in np.unique(bins)
    ]


def _confidence(gaps: FloatArray) -> FloatArray:
    """Probability of the completion that the model prefers: between one half and one."""
    return np.asarray(expit(np.abs(gaps)))


def _bins_of(gaps: FloatArray) -> IntArray:
    """Ten bins with equally many pairs: equal widths would leave most of them nearly empty."""
    ranks = np.argsort(np.argsort(np.abs(gaps), kind="stable"), kind="stable")
    return np.asarray(ranks * NUM_BINS // max(1, len(gaps)))


def _temperatures_of_other_folds(gaps: FloatArray, prompts: IntArray) -> FloatArray:
    folds = np.random.default_rng(SEED).permutation(int(prompts.max()) + 1)[prompts] % NUM_FOLDS
    temperatures = np.ones(len(gaps))
    for fold in range(NUM_FOLDS):
        temperatures[folds == fold] = fit_temperature(gaps[folds != fold])
    return temperatures


def _loss(gaps: FloatArray) -> float:
    return bradley_terry_loss(gaps, np.zeros_like(gaps)).mean
