"""The report's measures have their defined values, and a report outside a bound is refused."""

from __future__ import annotations

import math

import pytest
from scipy.stats import spearmanr

from export.onnx.reward_comparison import BOUNDS, Bounds, compare_rewards, validate_parity
from service.errors import ParityError

REFERENCE = [0.1, -1.5, 2.0, 0.7]


def test_the_report_has_the_values_of_a_hand_calculation() -> None:
    """Largest and mean difference, rank correlation and the share of pairs in the same order."""
    rewards = [0.8, -1.5, 2.0, 0.7]

    report = compare_rewards(rewards, REFERENCE, "built-in")

    assert report.max_difference == pytest.approx(0.7)
    assert report.mean_difference == pytest.approx(0.175)
    assert report.spearman == pytest.approx(spearmanr(rewards, REFERENCE).statistic)
    assert report.pair_agreement == pytest.approx(5 / 6)
    assert (report.num_texts, report.text_source) == (4, "built-in")


def test_pairs_with_equal_reference_rewards_do_not_count() -> None:
    """Equal reference rewards have no order; equal rewards instead of different ones are a disagreement."""
    assert compare_rewards([1.0, 2.0, 3.0], [1.0, 1.0, 3.0], "").pair_agreement == 1.0
    assert compare_rewards([1.0, 1.0, 3.0], [1.0, 2.0, 3.0], "").pair_agreement == pytest.approx(2 / 3)


def test_equal_rewards_are_within_every_bound() -> None:
    """The reference is accepted as the graph's rewards in every precision."""
    report = compare_rewards(REFERENCE, REFERENCE, "")

    for bounds in BOUNDS.values():
        validate_parity(report, bounds, REFERENCE)


def test_fp32_is_validated_by_the_largest_difference() -> None:
    """One text beyond the bound is enough; the bound is scaled by rewards larger than one."""
    validate_parity(compare_rewards([1.00005, 0.0], [1.0, 0.0], ""), BOUNDS["fp32"], [1.0, 0.0])
    validate_parity(compare_rewards([10.0005, 0.0], [10.0, 0.0], ""), BOUNDS["fp32"], [10.0, 0.0])
    with pytest.raises(ParityError, match=r"differ by up to 0\.0002"):
        validate_parity(compare_rewards([1.0002, 0.0], [1.0, 0.0], ""), BOUNDS["fp32"], [1.0, 0.0])


def test_lower_precisions_are_validated_by_the_order() -> None:
    """A wrong order is refused with a remedy; adding a constant to all rewards is not."""
    validate_parity(compare_rewards([value + 1 for value in REFERENCE], REFERENCE, ""), BOUNDS["int8"], REFERENCE)
    with pytest.raises(ParityError, match="--min-spearman"):
        validate_parity(compare_rewards(REFERENCE[::-1], REFERENCE, ""), BOUNDS["int8"], REFERENCE)


@pytest.mark.parametrize("bounds", [Bounds(max_difference=1e9), Bounds(min_spearman=-1.0)])
def test_a_reward_that_is_not_finite_is_outside_every_bound(bounds: Bounds) -> None:
    """NaN from a graph is refused, however wide the bound."""
    with pytest.raises(ParityError, match="Nothing was written"):
        validate_parity(compare_rewards([math.nan, *REFERENCE[1:]], REFERENCE, ""), bounds, REFERENCE)
