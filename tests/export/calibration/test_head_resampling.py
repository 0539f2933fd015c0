"""Resampled heads from preference pairs: how far they depart from the served head, and where they disagree."""

from __future__ import annotations

import numpy as np
import pytest

from export.calibration.head_resampling import MIN_PAIRS, LabelledPairs, fit_resampled_heads
from service.diagnostics.resampled_heads import disagreement

HIDDEN = 12
MEAN = np.zeros(HIDDEN, np.float32)


def made_up_pairs(true_head: np.ndarray, served_head: np.ndarray, num_pairs: int = 1500) -> LabelledPairs:
    """Pairs in which the true head decides at random which completion is chosen; the last axis never varies."""
    rng = np.random.default_rng(0)
    differences = rng.normal(size=(num_pairs, HIDDEN)) * np.linspace(1.0, 0.2, HIDDEN)
    differences[:, -1] = 0.0
    is_first = rng.random(num_pairs) < 1 / (1 + np.exp(-differences @ true_head))
    labelled = np.where(is_first[:, None], differences, -differences).astype(np.float32)
    return LabelledPairs(labelled, (labelled @ served_head).astype(np.float64), np.arange(num_pairs))


SERVED = np.r_[1.0, np.zeros(HIDDEN - 1)]


def test_heads_depart_from_a_served_head_that_misses_something() -> None:
    """Where the pairs hold what the served head misses, the prior is wide and the heads gain likelihood; else not."""
    missing = SERVED + np.r_[0.0, 0.0, 1.5, np.zeros(HIDDEN - 3)]
    fitted, sound = [fit_resampled_heads(made_up_pairs(truth, SERVED), MEAN, seed=0) for truth in (missing, SERVED)]

    assert fitted is not None
    assert sound is not None
    assert fitted[1].log_likelihood_gain > 0.02 > sound[1].log_likelihood_gain
    assert fitted[1].prior_share > sound[1].prior_share
    assert fitted[0].weights[2].mean() == pytest.approx(1.5, abs=0.4)


def test_heads_disagree_less_where_there_are_more_pairs() -> None:
    """Ten times the pairs give less disagreement about the same items, and equal seeds give equal heads."""
    truth = SERVED + np.r_[0.0, 0.0, 1.5, np.zeros(HIDDEN - 3)]
    items = np.random.default_rng(1).normal(size=(50, HIDDEN)).astype(np.float32)
    few, again, many = [
        fit_resampled_heads(made_up_pairs(truth, SERVED, num_pairs), MEAN, seed=0) for num_pairs in (300, 300, 3000)
    ]

    assert few is not None
    assert again is not None
    assert many is not None
    assert np.array_equal(few[0].weights, again[0].weights)
    spread_of_few, spread_of_many = [disagreement(one[0].deviations(items)).mean() for one in (few, many)]
    assert spread_of_many < 0.7 * spread_of_few


def test_few_pairs_give_no_heads() -> None:
    """Below the least number of pairs nothing is fitted."""
    assert fit_resampled_heads(made_up_pairs(SERVED, SERVED, MIN_PAIRS - 1), MEAN, seed=0) is None
