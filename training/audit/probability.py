"""Calibration of the Bradley-Terry probability: of pairs predicted with 70 percent, are 70 percent right?

Pure: it takes gaps of rewards and returns figures. Accuracy depends on the sign of a gap only; a policy is trained on
its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit

from training.audit.accuracy import wins_of
from training.audit.intervals import Interval, bootstrap_interval, share_interval
from training.audit.scored_pairs import FloatArray, IntArray, ScoredPairs
from training.bradley_terry import bradley_terry_loss

NUM_BINS = 10
NUM_FOLDS = 5
NUM_DRAWS = 500
SEED = 0
TEMPERATURES = (0.02, 50.0)
"""Range in which the best temperature is searched; that of a model at chance is infinite."""

NUM_GRID_TEMPERATURES = 79
"""Grid of the interval of the temperature; adjacent ones differ by 10.5 percent."""


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Pairs with similar predicted probabilities."""

    num_pairs: int

    confidence: float
    """Mean predicted probability of the completion that the model prefers."""

    accuracy: Interval
    """Share of the pairs in which that completion was chosen."""


@dataclass(frozen=True, slots=True)
class Probability:
    """Calibration of the probabilities sigma(gap)."""

    bins: Sequence[ReliabilityBin]

    loss: float
    """Mean Bradley-Terry loss in nats; 0.693 for a constant probability of one half."""

    ece: float
    """Expected calibration error (Naeini et al. 2015): mean over pairs of |accuracy - confidence| of their bin."""

    calibrated_ece: float
    """The 95 percent quantile of ``ece`` if every probability were exact; above zero because bins are finite."""

    temperature: float
    """The T for which sigma(gap / T) has the lowest loss on these pairs (Guo et al. 2017); above 1 for an overconfident
    model."""

    temperature_interval: Interval
    """95 percent confidence interval of ``temperature`` over prompts, on a grid; it reaches an end of ``TEMPERATURES``
    where the pairs do not determine a temperature."""

    loss_at_temperature: float
    """``loss`` of sigma(gap / T), with a T fitted on other prompts (five-fold)."""

    ece_at_temperature: float
    """``ece`` of sigma(gap / T), with a T fitted on other prompts (five-fold)."""

    @property
    def is_calibrated(self) -> bool:
        """Whether the calibration error is no larger than exact probabilities would have on these pairs."""
        return self.ece <= self.calibrated_ece


def measure_probability(scored: ScoredPairs) -> Probability:
    """Compute the calibration of the probabilities, before and after temperature scaling."""
    gaps, prompts = scored.gaps, scored.prompts
    tempered = gaps / _temperatures_of_other_folds(gaps, prompts)
    return Probability(
        bins=_reliability(gaps, prompts),
        loss=_loss(gaps),
        ece=expected_calibration_error(gaps),
        calibrated_ece=_calibrated_ece(gaps),
        temperature=fit_temperature(gaps),
        temperature_interval=_temperature_interval(gaps, prompts),
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


def _calibrated_ece(gaps: FloatArray) -> float:
    """Return the 95 percent quantile of the calibration error if each pair is right with the predicted probability."""
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
    """Return the probability of the completion that the model prefers, between one half and one [pair]."""
    return np.asarray(expit(np.abs(gaps)))


def _bins_of(gaps: FloatArray) -> IntArray:
    """Return bin numbers [pair]; bins have equally many pairs, since most bins of equal width would be nearly empty."""
    ranks = np.argsort(np.argsort(np.abs(gaps), kind="stable"), kind="stable")
    return np.asarray(ranks * NUM_BINS // max(1, len(gaps)))


def _temperatures_of_other_folds(gaps: FloatArray, prompts: IntArray) -> FloatArray:
    folds = np.random.default_rng(SEED).permutation(int(prompts.max()) + 1)[prompts] % NUM_FOLDS
    temperatures = np.ones(len(gaps))
    for fold in range(NUM_FOLDS):
        temperatures[folds == fold] = fit_temperature(gaps[folds != fold])
    return temperatures


def _temperature_interval(gaps: FloatArray, prompts: IntArray) -> Interval:
    """Bootstrap the best temperature of a grid; without any best one (all gaps are zero) it is the whole range."""
    if not np.any(gaps):
        return Interval(1.0, *TEMPERATURES)
    grid = np.geomspace(*TEMPERATURES, NUM_GRID_TEMPERATURES)
    losses = np.logaddexp(0.0, -gaps[:, None] / grid)  # [pair, temperature]

    def best(indices: IntArray) -> float:
        return float(grid[np.argmin(np.bincount(indices, minlength=len(gaps)) @ losses)])

    return bootstrap_interval(best, prompts)


def _loss(gaps: FloatArray) -> float:
    return bradley_terry_loss(gaps, np.zeros_like(gaps)).mean
