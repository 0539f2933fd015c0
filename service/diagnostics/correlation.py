"""Correlation coefficients of two series, with one definition of what they are where a series does not vary.

The monitors compute Pearson's coefficient from rolling moments instead (see service.diagnostics.monitors.moments).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike


def pearson_correlation(left: ArrayLike, right: ArrayLike) -> float:
    """Return Pearson's coefficient r; NaN for fewer than two values, or where one of the series is constant.

    Whether a series is constant is decided by its range and not by its standard deviation: rounding of the mean gives
    equal numbers a small deviation.

    Args:
        left: [n].
        right: [n].
    """
    return float(np.corrcoef(np.asarray(left), np.asarray(right))[0, 1]) if _have_variation(left, right) else math.nan


def spearman_correlation(left: ArrayLike, right: ArrayLike) -> float:
    """Return Spearman's coefficient: Pearson's of the ranks, where ties share their mean rank; NaN as there.

    Args:
        left: [n].
        right: [n].
    """
    from scipy.stats import spearmanr  # half a second, which a replica that needs no coefficient does not wait for

    return float(spearmanr(left, right).statistic) if _have_variation(left, right) else math.nan


def _have_variation(left: ArrayLike, right: ArrayLike) -> bool:
    return all(len(values) > 1 and np.ptp(values) != 0 for values in (np.asarray(left), np.asarray(right)))
