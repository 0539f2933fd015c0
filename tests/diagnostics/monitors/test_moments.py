"""Moments merge without loss and give the correlations and slopes that numpy gives on all rows."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from service.diagnostics.monitors.moments import (
    Moments,
    WithinMoments,
    correlation_interval,
    lower_bound_of_size,
    merge_moments,
    partial_correlation,
    pearson,
    regress,
)


def correlated(n: int, size: int = 4, seed: int = 0) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, size)) @ rng.normal(size=(size, size)) + rng.normal(size=size) * 10


@pytest.mark.parametrize("cuts", [[], [1], [0, 500], [1, 2, 3, 999], list(range(0, 1000, 7))])
def test_merging_is_a_single_pass(cuts: list[int]) -> None:
    """However the rows are cut into parts, also empty ones, the merged moments are those of all rows."""
    rows = correlated(1000)

    merged = merge_moments((Moments.of(part) for part in np.split(rows, cuts)), 4)

    assert merged.count == 1000
    assert merged.mean == pytest.approx(rows.mean(axis=0), rel=1e-13)
    assert merged.comoment == pytest.approx(np.cov(rows.T) * 999, rel=1e-12)


def test_ten_million_items_far_from_zero() -> None:
    """With a mean of a million deviations, ten million items keep their correlation, in one process and in eight."""
    rng = np.random.default_rng(0)
    parts, exact = [], []
    for _ in range(100):
        first = rng.normal(size=100_000)
        second = 0.5 * first + np.sqrt(0.75) * rng.normal(size=100_000)
        pair = np.column_stack([first, second])
        exact.append(Moments.of(pair))  # about zero, where nothing cancels
        parts.append(Moments.of(pair + 1e6))

    single = pearson(merge_moments(parts, 2).comoment)
    merged = pearson(merge_moments([merge_moments(parts[start::8], 2) for start in range(8)], 2).comoment)
    expected = pearson(merge_moments(exact, 2).comoment)

    # The items themselves are rounded at 1e-10 of their deviation, which limits the accuracy.
    assert single == pytest.approx(expected, rel=1e-9)
    assert merged == pytest.approx(single, rel=1e-10)


def test_within_groups_takes_the_groups_means_out() -> None:
    """Co-moments about the group means, merged or at once, are those of centred rows; groups of one do not count."""
    rng = np.random.default_rng(3)
    groups = rng.integers(0, 40, 300)
    rows = correlated(300) + groups[:, None] * 5.0
    sizes = np.bincount(groups)
    has_siblings = sizes[groups] > 1
    means = np.array([rows[groups == group].mean(axis=0) for group in groups])
    centered = (rows - means)[has_siblings]

    at_once = WithinMoments.of(rows, groups)
    merged = WithinMoments.of(rows[groups < 20], groups[groups < 20]).merged(
        WithinMoments.of(rows[groups >= 20], groups[groups >= 20])
    )

    for found in (at_once, merged):
        assert (found.count, found.num_groups) == (has_siblings.sum(), (sizes > 1).sum())
        assert found.comoment == pytest.approx(centered.T @ centered, rel=1e-10)


def test_pearson_is_numpys() -> None:
    """The correlation is numpy's; of a constant it is unknown, not zero."""
    rows = correlated(500)

    expected = np.corrcoef(rows[:, 1], rows[:, 3])[0, 1]

    assert pearson(Moments.of(rows).comoment, 1, 3) == pytest.approx(expected, rel=1e-12)
    assert pearson(Moments.of(rows * [1, 0, 1, 1]).comoment, 0, 1) is None
    assert pearson(Moments.empty(2).comoment) is None


def test_regression_is_least_squares() -> None:
    """Slopes and R squared are those of numpy's least squares with an intercept."""
    rows = correlated(400)
    design = np.column_stack([np.ones(400), rows[:, 1:]])
    solution, *_ = np.linalg.lstsq(design, rows[:, 0], rcond=None)
    residuals = rows[:, 0] - design @ solution

    fit = regress(Moments.of(rows).comoment, 0, [1, 2, 3])

    assert fit is not None
    assert fit.slopes == pytest.approx(solution[1:], rel=1e-8)
    assert fit.r_squared == pytest.approx(1 - residuals.var() / rows[:, 0].var(), rel=1e-8)


def test_regressor_that_never_varies_has_no_slope() -> None:
    """A constant feature has no slope and does not affect the others; with dependent features there is no fit."""
    rows = correlated(400)
    constant = Moments.of(rows * [1, 1, 0, 1]).comoment
    dependent = Moments.of(np.column_stack([rows, 2 * rows[:, 1]])).comoment

    fit = regress(constant, 0, [1, 2, 3])

    assert fit is not None
    assert fit.slopes[1] is None
    assert None not in (fit.slopes[0], fit.slopes[2])
    assert regress(dependent, 0, [1, 2, 3, 4]) is None


def test_partial_correlation_is_that_of_residuals() -> None:
    """The partial correlation is the correlation of the residuals of regressions on the others."""
    rows = correlated(600)
    others = np.column_stack([np.ones(600), rows[:, 2:]])
    left = rows[:, :2] - others @ np.linalg.lstsq(others, rows[:, :2], rcond=None)[0]

    found = partial_correlation(Moments.of(rows).comoment, 0, 1, [2, 3])

    assert found == pytest.approx(np.corrcoef(left.T)[0, 1], rel=1e-8)


@pytest.mark.parametrize(("n", "warn", "critical"), [(256, 0.408, 0.628), (1024, 0.355, 0.589), (4096, 0.328, 0.569)])
def test_bounds_of_the_two_readings(n: int, warn: float, critical: float) -> None:
    """The point estimates that exceed the limits of r and of r squared are those in docs/monitoring.md."""
    for r, level in ((warn, 0.3), (critical, 0.3**0.5)):
        below, above = lower_bound_of_size(-(r - 0.001), n - 3), lower_bound_of_size(r + 0.001, n - 3)
        assert below is not None
        assert above is not None
        assert below < level < above


def test_interval_of_a_perfect_correlation_is_finite() -> None:
    """A correlation of one has an interval, and too few pairs have none."""
    interval = correlation_interval(1.0, 10)

    assert interval is not None
    assert 0.99 < interval[0] <= interval[1] <= 1.0
    assert correlation_interval(0.5, 0) is None
