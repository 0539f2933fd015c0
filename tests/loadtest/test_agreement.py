"""Agreement of rewards: its arithmetic by hand, and what it forgives."""

from __future__ import annotations

import math

import numpy as np
import pytest

from loadtest.agreement import Agreement, agreement_between, ranks


def test_ranks_share_the_mean_among_equals() -> None:
    """Ranks as Spearman's coefficient needs them."""
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


def test_agreement_of_a_case_worked_out_by_hand() -> None:
    """Difference, spread of the reference and rank correlation."""
    agreement = agreement_between([0.0, 1.0, 2.0, 3.0], [0.0, 1.5, 3.5, 2.5])

    assert (agreement.num_items, agreement.max_difference) == (4, 1.5)
    assert agreement.spread == pytest.approx(math.sqrt(1.25))
    # One swap of neighbours among four: 1 - 6 x 2 / (4 x 15).
    assert agreement.spearman == pytest.approx(0.8)
    assert not agreement.holds("bfloat16")


@pytest.mark.parametrize(
    ("dtype", "max_difference", "spearman", "agrees"),
    [
        ("float32", 1e-6, 1.0, True),
        ("float32", 1e-2, 1.0, False),
        ("bfloat16", 1e-2, 0.999, True),
        ("bfloat16", 1e-2, 0.9, False),
        ("bfloat16", 0.5, 0.999, False),
    ],
)
def test_rounding_is_forgiven_and_nothing_else(
    dtype: str, max_difference: float, spearman: float, agrees: bool
) -> None:
    """fp32 must be equal to a few digits, 16 bits to their rounding, both in rank."""
    agreement = Agreement(num_items=100, max_difference=max_difference, spread=0.5, spearman=spearman)

    assert agreement.holds(dtype) is agrees
