"""The comparison of rewards has the values of a hand calculation, and accepts rounding alone."""

from __future__ import annotations

import math

import pytest

from loadtest.reward_comparison import RewardComparison, compare_rewards


def test_the_comparison_has_the_values_of_a_hand_calculation() -> None:
    """Largest difference, spread of the reference and rank correlation."""
    comparison = compare_rewards([0.0, 1.0, 2.0, 3.0], [0.0, 1.5, 3.5, 2.5])

    assert (comparison.num_items, comparison.max_difference) == (4, 1.5)
    assert comparison.spread == pytest.approx(math.sqrt(1.25))
    # One swap of adjacent ranks among four: 1 - 6 x 2 / (4 x 15).
    assert comparison.spearman == pytest.approx(0.8)
    assert not comparison.is_rounding("bfloat16")


def test_rewards_without_an_order_are_not_accepted() -> None:
    """Where one side's rewards are all equal there is no rank correlation, and no limit accepts NaN."""
    comparison = compare_rewards([0.0, 1e-9], [0.0, 0.0])

    assert math.isnan(comparison.spearman)
    assert not comparison.is_rounding("float32")


@pytest.mark.parametrize(
    ("dtype", "max_difference", "spearman", "accepted"),
    [
        ("float32", 1e-6, 1.0, True),
        ("float32", 1e-2, 1.0, False),
        ("bfloat16", 1e-2, 0.999, True),
        ("bfloat16", 1e-2, 0.9, False),
        ("bfloat16", 0.5, 0.999, False),
    ],
)
def test_rounding_is_accepted_and_nothing_else(
    dtype: str, max_difference: float, spearman: float, accepted: bool
) -> None:
    """fp32 rewards must be equal to a few digits, 16-bit rewards to their rounding, and both in rank."""
    comparison = RewardComparison(num_items=100, max_difference=max_difference, spread=0.5, spearman=spearman)

    assert comparison.is_rounding(dtype) is accepted
