"""Pearson's and Spearman's coefficients equal SciPy's, and are NaN where they are not defined."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from service.diagnostics.correlation import pearson_correlation, spearman_correlation


def test_coefficients_equal_those_of_scipy() -> None:
    """On data with ties both coefficients are SciPy's."""
    rng = np.random.default_rng(0)
    left = rng.integers(10, size=100).astype(float)
    right = left + rng.integers(10, size=100)

    assert pearson_correlation(left, right) == pytest.approx(pearsonr(left, right).statistic)
    assert spearman_correlation(left, right) == pytest.approx(spearmanr(left, right).statistic)


def test_spearman_of_a_hand_calculation() -> None:
    """One swap of adjacent ranks among four: 1 - 6 x 2 / (4 x 15)."""
    assert spearman_correlation([0.0, 1.0, 2.0, 3.0], [0.0, 1.5, 3.5, 2.5]) == pytest.approx(0.8)


@pytest.mark.parametrize("right", [[0.1 + 0.2] * 3, [1.0, math.nan, 2.0]], ids=["constant", "nan"])
@pytest.mark.parametrize("correlation", [pearson_correlation, spearman_correlation])
def test_an_undefined_coefficient_is_nan(correlation, right: list[float]) -> None:
    """A series that does not vary, or holds a NaN, has no correlation; neither has a single value."""
    assert math.isnan(correlation([1.0, 2.0, 3.0], right))
    assert math.isnan(correlation([1.0], [2.0]))
