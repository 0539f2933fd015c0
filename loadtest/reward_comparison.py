"""Compares two lists of rewards of the same items, and decides whether their difference is explained by rounding.

Pure: it takes rewards, wherever they were computed, and returns figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.diagnostics.correlation import spearman_correlation


@dataclass(frozen=True, slots=True)
class RewardComparison:
    """The difference between the rewards of two ways of scoring."""

    num_items: int

    max_difference: float
    """Largest absolute difference."""

    spread: float
    """Standard deviation of the reference's rewards, which gives ``max_difference`` its scale."""

    spearman: float
    """Spearman's rank correlation; NaN where all rewards of one side are equal."""

    def is_rounding(self, dtype: str) -> bool:
        """Whether the difference is within the limits of rounding in a dtype.

        In 16 bits both sides round, each in its own order of operations, so their limits are wider than those of fp32.
        """
        if dtype == "float32":
            return self.spearman >= 0.9999 and self.max_difference <= 1e-4 * max(1.0, self.spread)
        return self.spearman >= 0.995 and self.max_difference <= 0.2 * self.spread


def compare_rewards(reference: Sequence[float], rewards: Sequence[float]) -> RewardComparison:
    """Compare rewards with those of a reference.

    Args:
        reference: [item], at least one.
        rewards: of the same items, in the same order.
    """
    expected, found = np.asarray(reference), np.asarray(rewards)
    return RewardComparison(
        num_items=len(expected),
        max_difference=float(np.abs(expected - found).max()),
        spread=float(expected.std()),
        spearman=spearman_correlation(expected, found),
    )
