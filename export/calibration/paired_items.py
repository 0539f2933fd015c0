"""Finds the preference pairs among the items of a calibration's data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from export.calibration.data import CleanItem


def preference_pairs(items: Sequence[CleanItem]) -> NDArray[np.int64]:
    """Return the pairs of which both completions are among the items, and differ.

    Args:
        items: in the order of their rows; items may be left out.

    Returns:
        int64 [pairs, 2]: indices of the chosen and of the rejected completion.
    """
    pairs = [
        (index, index + 1)
        for index, (first, second) in enumerate(pairwise(items))
        if first.is_chosen
        and first.pair == second.pair
        and not second.is_chosen
        and first.exchange.completion != second.exchange.completion
    ]
    return np.array(pairs, np.int64).reshape(-1, 2)
