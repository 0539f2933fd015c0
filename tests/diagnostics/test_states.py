"""Distances, reward deviations and tree sums against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf
from sklearn.ensemble import GradientBoostingClassifier

from export.calibration import fit as calibration_fit
from export.calibration.fit import fit_gaussian, fit_laplace, fit_siblings, fit_state_form, fit_trees
from service.diagnostics.states import PER_TAP

_RNG = np.random.default_rng(0)
STATES = (_RNG.normal(size=(400, 12)) @ _RNG.normal(size=(12, 12))).astype(np.float32)


def test_low_rank_distance_is_the_full_one_with_all_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all axes but one, the factor form gives the Mahalanobis distance under the Ledoit-Wolf covariance."""
    monkeypatch.setattr(calibration_fit, "MAX_AXES", 11)
    form = fit_state_form(STATES)
    centred = STATES.astype(np.float64) - STATES.mean(axis=0, dtype=np.float64)
    covariance, _ = ledoit_wolf(centred, assume_centered=True)

    distance = np.exp(form.statistics(STATES)[:, PER_TAP.index("distance")])

    exact = np.einsum("ij,jk,ik->i", centred, np.linalg.inv(covariance), centred)
    assert distance == pytest.approx(exact, rel=2e-3)


def test_state_statistics_by_hand() -> None:
    """Norm and cosine are those of the state itself, the residual is what the axes leave."""
    form = fit_state_form(STATES)
    numbers = dict(zip(PER_TAP, form.statistics(STATES[:1])[0], strict=True))
    centred = STATES[0] - form.mean

    assert numbers["length"] == pytest.approx(np.log(np.linalg.norm(STATES[0])), rel=1e-5)
    assert numbers["norm"] == pytest.approx(np.log(centred @ centred), rel=1e-4)
    cosine = STATES[0] @ form.mean / np.linalg.norm(STATES[0]) / np.linalg.norm(form.mean)
    assert numbers["cosine"] == pytest.approx(cosine, rel=1e-4)
    assert numbers["residual"] <= numbers["norm"] + 1e-6


def test_trees_sum_as_scikit_learn_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stored arrays give the decision function of the fitted model, up to its constant."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(calibration_fit, "NUM_TREES", 12)
    clean, hacked = rng.normal(size=(300, 5)), rng.normal(0.8, 1.2, size=(200, 5))
    fitted: list[GradientBoostingClassifier] = []
    fit = GradientBoostingClassifier.fit
    monkeypatch.setattr(GradientBoostingClassifier, "fit", lambda self, *a, **k: fitted.append(fit(self, *a, **k)))

    ensemble = fit_trees(clean, hacked, range(5), seed=0)

    fresh = rng.normal(size=(500, 5))
    ours, theirs = ensemble.score(fresh), fitted[0].decision_function(fresh)
    assert ours - ours.mean() == pytest.approx(theirs - theirs.mean(), abs=1e-4)


def test_shrunk_gaussian_is_standardised_and_clipped() -> None:
    """An extreme statistic counts as ten standard deviations, so the distance is finite and others still matter."""
    gaussian = fit_gaussian(STATES.astype(np.float64), range(6))
    wild = STATES[:1].astype(np.float64).copy()
    wild[0, 2] = 1e30

    assert np.isfinite(gaussian.distance(wild)).all()
    assert np.abs(gaussian.standardised(wild)).max() == 10.0


@pytest.mark.parametrize("size", [2, 5, 8])
def test_sibling_distance_has_one_scale_for_all_group_sizes(size: int) -> None:
    """Deviations from siblings, scaled by sqrt(n / (n - 1)), have the same mean distance whatever n is."""
    rng = np.random.default_rng(0)
    columns = 4
    means = np.repeat(rng.normal(0, 5, size=(600, columns)), 2, axis=0)
    pairs = means + rng.normal(size=means.shape)
    gaussian = fit_siblings(pairs, np.repeat(np.arange(600), 2), fit_gaussian(pairs, range(columns)))

    groups = [rng.normal(0, 5, columns) + rng.normal(size=(size, columns)) for _ in range(400)]
    mean = np.mean([gaussian.sibling_distance(group).mean() for group in groups])

    assert mean == pytest.approx(columns, rel=0.15)


def test_laplace_deviation_shrinks_along_observed_preferences() -> None:
    """Without pairs the deviation is the prior's; pairs along a direction reduce it along that direction."""
    rng = np.random.default_rng(0)
    form = fit_state_form(STATES)
    prompts = np.repeat(np.arange(200), 2)
    rewards = STATES @ rng.normal(size=12)

    factor = fit_laplace(STATES, rewards.astype(np.float64), prompts, form)

    assert factor is not None
    centred = STATES[0].astype(np.float64) - form.mean
    prior_only = np.sqrt(centred @ centred / factor.prior)
    assert 0 < factor.reward_std(STATES[:1])[0] < prior_only
    assert fit_laplace(STATES, rewards.astype(np.float64), np.arange(400), form) is None
