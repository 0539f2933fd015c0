"""Measures whether the figures of uncertainty predict which preference pairs the reward orders wrongly.

A useful figure of uncertainty is high for the pairs that are wrong: its AUROC against them is above one half, and the
error of the pairs that it leaves falls as the most uncertain ones are given up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from service.diagnostics.conformal import Scores
from service.diagnostics.resampled_heads import disagreement
from service.records import Score

NUM_RESAMPLES = 200
MIN_ERRORS = 10
"""Pairs of each kind (right, wrong) below which nothing is measured."""

RETAINED = (0.75, 0.5, 0.25)
"""Shares of the pairs at which the error-retention curve is shown."""

MAIN_FIGURE = "disagreement"
"""The figure that the others are compared with."""


@dataclass(frozen=True, slots=True)
class ErrorPrediction:
    """How well one figure predicts which pairs are wrong."""

    auroc: float
    """Probability that the figure is higher for a wrong pair than for a right one."""

    standard_error: float
    """Of the AUROC, by bootstrap over prompts."""

    behind: float | None
    """AUROC of the disagreement less this one's, on the same pairs; None without heads."""

    behind_error: float | None
    """Standard error of ``behind``, by bootstrap over prompts; None without heads."""

    retention_area: float
    """Area under the error-retention curve: the mean, over the share of pairs that is retained, of the wrong ones among
    them as a share of all pairs. Lower is better."""

    retained_errors: tuple[float, ...]
    """Points of that curve: the share of wrong pairs among those that are retained, for each of `RETAINED`."""


@dataclass(frozen=True, slots=True)
class PairReport:
    """What was measured on preference pairs."""

    num_pairs: int
    error: float
    """Share of pairs that the reward orders wrongly."""

    random_area: float
    """Area of a figure that knows nothing."""

    ideal_area: float
    """Area of a figure that gives up exactly the wrong pairs first."""

    figures: dict[str, ErrorPrediction]


def measure_pairs(
    scores: Sequence[Score], pairs: NDArray[np.int64], prompts: NDArray[np.int64], seed: int = 0
) -> PairReport | None:
    """Measure every figure that all the pairs have; None for too few right or wrong pairs.

    Args:
        scores: at level ``full``.
        pairs: int64 [pairs, 2], indices of the chosen and of the rejected one.
        prompts: number of the prompt of each score, int64 [scores].
        seed: of the bootstrap.
    """
    if not len(pairs):
        return None
    margins = _margins(scores, pairs)
    wrong = margins <= 0
    if min(wrong.sum(), (~wrong).sum()) < MIN_ERRORS:
        return None
    figures = _figures(scores, pairs, margins)
    resamples = _resamples(prompts[pairs[:, 0]], wrong, seed)
    aurocs = {
        name: np.array([_auroc(wrong[chosen], values[chosen]) for chosen in resamples])
        for name, values in figures.items()
    }
    main = figures.get(MAIN_FIGURE)
    error = float(wrong.mean())
    return PairReport(
        num_pairs=len(pairs),
        error=error,
        random_area=error / 2,
        ideal_area=error**2 / 2,
        figures={
            name: ErrorPrediction(
                auroc=_auroc(wrong, values),
                standard_error=float(aurocs[name].std()),
                behind=None if main is None else _auroc(wrong, main) - _auroc(wrong, values),
                behind_error=None if main is None else float((aurocs[MAIN_FIGURE] - aurocs[name]).std()),
                retention_area=retention_area(wrong, values),
                retained_errors=retained_errors(wrong, values),
            )
            for name, values in figures.items()
        },
    )


def retention_area(wrong: NDArray[np.bool_], figure: Scores) -> float:
    """Return the area under the error-retention curve; pairs are retained from the lowest figure on.

    Args:
        wrong: [pairs].
        figure: float64 [pairs].
    """
    retained = wrong[np.argsort(figure, kind="stable")].astype(np.float64)
    return float((np.cumsum(retained) / len(retained)).mean())


def retained_errors(wrong: NDArray[np.bool_], figure: Scores) -> tuple[float, ...]:
    """Return the share of wrong pairs among those with the lowest figures, for each of `RETAINED`.

    Args:
        wrong: [pairs].
        figure: float64 [pairs].
    """
    retained = wrong[np.argsort(figure, kind="stable")]
    return tuple(float(retained[: max(1, round(share * len(retained)))].mean()) for share in RETAINED)


def _margins(scores: Sequence[Score], pairs: NDArray[np.int64]) -> Scores:
    rewards = np.array([score.reward for score in scores], np.float64)
    return np.asarray(rewards[pairs[:, 0]] - rewards[pairs[:, 1]])


def _figures(scores: Sequence[Score], pairs: NDArray[np.int64], margins: Scores) -> Mapping[str, Scores]:
    """Return the figures, each higher for the pairs that should be less certain."""
    spread = np.zeros(0)
    deviations = [score.head_deviations for score in scores]
    if None not in deviations:
        table = np.array(deviations, np.float64)
        spread = disagreement(table[pairs[:, 0]] - table[pairs[:, 1]])
    stds = np.array([score.reward_std_epistemic for score in scores], np.float64)
    surprises = np.array([None if score.ood is None else score.ood.surprise for score in scores], np.float64)
    distances = np.array([None if score.ood is None else score.ood.score for score in scores], np.float64)
    figures = {
        MAIN_FIGURE: spread,
        "disagreement / margin": spread / np.maximum(np.abs(margins), 1e-9) if len(spread) else spread,
        "small margin": -np.abs(margins),
        "Laplace": np.hypot(stds[pairs[:, 0]], stds[pairs[:, 1]]),
        "surprise": surprises[pairs].max(axis=1),
        "Mahalanobis distance": distances[pairs].max(axis=1),
    }
    return {name: values for name, values in figures.items() if len(values) and np.isfinite(values).all()}


def _resamples(prompts: NDArray[np.int64], wrong: NDArray[np.bool_], seed: int) -> list[NDArray[np.int64]]:
    """Return indices of the pairs of resampled prompts, with right and wrong ones in each."""
    rng = np.random.default_rng(seed)
    _, members = np.unique(prompts, return_inverse=True)
    order = np.argsort(members, kind="stable")
    of_prompt = np.split(order, np.cumsum(np.bincount(members))[:-1])
    drawn = [
        np.concatenate([of_prompt[prompt] for prompt in rng.integers(len(of_prompt), size=len(of_prompt))])
        for _ in range(NUM_RESAMPLES)
    ]
    return [chosen for chosen in drawn if 0 < wrong[chosen].sum() < len(chosen)]


def _auroc(wrong: NDArray[np.bool_], figure: Scores) -> float:
    """Return the AUROC from the ranks (Mann and Whitney, 1947), many times faster than with a curve."""
    num_wrong = int(wrong.sum())
    excess = rankdata(figure)[wrong].sum() - num_wrong * (num_wrong + 1) / 2
    return float(excess / (num_wrong * (len(wrong) - num_wrong)))
