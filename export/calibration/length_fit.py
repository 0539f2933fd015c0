"""Fits the reward that length alone predicts, so that little correlation remains over all items and within prompts.

The two ask for different curves. Over all items a curve also contains that some prompts have longer and better answers;
within prompts only differences between completions of one prompt count. One curve cannot serve both wherever the two
slopes differ, so a weight of the differences between prompts, from 0 (within alone) to 1 (all items alike), is chosen
by cross-validation over prompts. A correlation within prompts counts more than a pooled one: it is a bias, while longer
answers may be right for some prompts. Over all items, removing more than there is counts more than leaving a part of
it, because the curve is used on texts whose length bias is not known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.calibration.measure import length_correlations
from service.diagnostics.conformal import Scores
from service.diagnostics.detectors import Matrix
from service.diagnostics.reference import LengthCurve

BETWEEN_WEIGHTS = (0.0, 0.03, 0.1, 0.3, 1.0)
NUM_FOLDS = 5
WITHIN_TOLERANCE = 0.04
POOLED_TOLERANCE = 0.15
"""Correlations that count 1 each; they count by their squares."""

OVERCORRECTION = 4.0
"""Factor of a squared pooled correlation that has the opposite sign of the raw reward's."""

ROUGHNESS = 0.001
"""Weight of the squared second differences of the knots, relative to the number of items (P-splines, Eilers and Marx,
1996)."""


@dataclass(frozen=True, slots=True, eq=False)
class _Items:
    """Items to fit to, and what each knot of a curve contributes to them."""

    log_lengths: Scores
    rewards: Scores
    prompts: NDArray[np.int64]

    def part(self, chosen: NDArray[np.bool_]) -> _Items:
        return _Items(self.log_lengths[chosen], self.rewards[chosen], self.prompts[chosen])


def fit_length_curve(log_lengths: Scores, rewards: Scores, prompts: NDArray[np.int64]) -> LengthCurve:
    """Fit the curve.

    Args:
        log_lengths: ln(1 + completion tokens) of each item, float64 [items].
        rewards: float64 [items].
        prompts: number of each item's prompt, int64 [items].
    """
    items = _Items(log_lengths, rewards, prompts)
    return _fit(items, min(BETWEEN_WEIGHTS, key=lambda weight: _loss(items, weight)))


def _loss(items: _Items, between_weight: float) -> float:
    """Return the cost of the correlations that remain on prompts that the curve was not fitted to."""
    _, members = np.unique(items.prompts, return_inverse=True)
    fold = (np.random.default_rng(0).permutation(members.max() + 1) % NUM_FOLDS)[members]
    residuals = items.rewards.copy()
    for number in range(NUM_FOLDS):
        own = fold == number
        if own.any() and not own.all():
            curve = _fit(items.part(~own), between_weight)
            residuals[own] -= np.interp(items.log_lengths[own], curve.x, curve.y)
    raw = length_correlations(items.rewards, items.log_lengths, items.prompts)
    left = length_correlations(residuals, items.log_lengths, items.prompts)
    within = 0.0 if np.isnan(left.within) else left.within
    pooled = 0.0 if np.isnan(left.pooled) else left.pooled
    factor = OVERCORRECTION if raw.pooled * pooled < 0 else 1.0
    return (within / WITHIN_TOLERANCE) ** 2 + factor * (pooled / POOLED_TOLERANCE) ** 2


def _fit(items: _Items, between_weight: float) -> LengthCurve:
    """Return the penalised least-squares curve: differences within prompts count 1, those between prompts less."""
    knots = LengthCurve.of(items.log_lengths, items.rewards).x
    basis = np.stack([np.interp(items.log_lengths, knots, unit) for unit in np.eye(len(knots))], axis=1)
    between = _prompt_means(np.column_stack([basis, items.rewards]), items.prompts)
    within = np.column_stack([basis, items.rewards]) - between
    between = between - between.mean(axis=0)
    rows = np.concatenate([within, np.sqrt(between_weight) * between])
    second_differences = np.diff(np.eye(len(knots)), 2, axis=0)
    penalty = ROUGHNESS * len(basis) * second_differences.T @ second_differences
    ridge = 1e-6 * len(basis) * np.eye(len(knots))  # the level of the curve is arbitrary
    y = np.linalg.solve(rows[:, :-1].T @ rows[:, :-1] + penalty + ridge, rows[:, :-1].T @ rows[:, -1])
    return LengthCurve(knots, y, float((basis @ y).mean()))


def _prompt_means(values: Matrix, prompts: NDArray[np.int64]) -> Matrix:
    """Return for each item the mean over the items of its prompt."""
    _, members, sizes = np.unique(prompts, return_inverse=True, return_counts=True)
    sums = np.stack([np.bincount(members, column) for column in values.T], axis=1)
    return np.asarray((sums / sizes[:, None])[members])
