"""How far two lists of rewards of the same items agree, and which disagreement is rounding.

Pure arithmetic on numbers; where the rewards come from is the caller's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Agreement:
    """Whether two ways of scoring gave the same rewards.

    ``max_difference``: largest absolute one. ``spread``: standard deviation of the reference's rewards, without which
    the difference says nothing. ``spearman``: rank correlation.
    """

    num_items: int
    max_difference: float
    spread: float
    spearman: float

    def holds(self, dtype: str) -> bool:
        """Whether the differences are those of rounding: in 16 bits both sides round, each in its own order."""
        if dtype == "float32":
            return self.spearman >= 0.9999 and self.max_difference <= 1e-4 * max(1.0, self.spread)
        return self.spearman >= 0.995 and self.max_difference <= 0.2 * self.spread


def agreement_between(reference: Sequence[float], rewards: Sequence[float]) -> Agreement:
    """Compare rewards with those of a reference, item by item; at least two different rewards on each side."""
    wanted, found = np.asarray(reference), np.asarray(rewards)
    return Agreement(
        num_items=len(wanted),
        max_difference=float(np.abs(wanted - found).max()),
        spread=float(wanted.std()),
        spearman=float(np.corrcoef(ranks(wanted), ranks(found))[0, 1]),
    )


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value, float64 [n] from 1; equal values share the mean of their ranks."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]
