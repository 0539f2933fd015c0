"""The report compares numbers as its words say, and what disagrees is refused by the bound that it breaks."""

from __future__ import annotations

import math

import pytest
from scipy.stats import spearmanr

from export.onnx.agreement import BOUNDS, Bounds, compare_rewards, refuse_disagreement
from service.errors import ParityError

REFERENCE = [0.1, -1.5, 2.0, 0.7]


def test_the_report_holds_what_is_worked_out_by_hand() -> None:
    """Largest and mean difference, rank correlation and the share of pairs in the same order."""
    rewards = [0.8, -1.5, 2.0, 0.7]

    report = compare_rewards(rewards, REFERENCE, "built-in")

    assert report.max_difference == pytest.approx(0.7)
    assert report.mean_difference == pytest.approx(0.175)
    assert report.spearman == pytest.approx(spearmanr(rewards, REFERENCE).statistic)
    assert report.pair_agreement == pytest.approx(5 / 6)
    assert (report.num_items, report.items) == (4, "built-in")


def test_pairs_without_an_order_do_not_count() -> None:
    """Equal reference rewards have no order to keep; equal rewards in the place of different ones lose it."""
    assert compare_rewards([1.0, 2.0, 3.0], [1.0, 1.0, 3.0], "").pair_agreement == 1.0
    assert compare_rewards([1.0, 1.0, 3.0], [1.0, 2.0, 3.0], "").pair_agreement == pytest.approx(2 / 3)


def test_what_is_equal_meets_every_bound() -> None:
    """The reference agrees with itself in every precision."""
    report = compare_rewards(REFERENCE, REFERENCE, "")

    for bounds in BOUNDS.values():
        refuse_disagreement(report, bounds, REFERENCE)


def test_fp32_is_judged_by_its_largest_difference() -> None:
    """One text beyond the bound is enough; the bound grows with rewards beyond one."""
    refuse_disagreement(compare_rewards([1.00005, 0.0], [1.0, 0.0], ""), BOUNDS["fp32"], [1.0, 0.0])
    refuse_disagreement(compare_rewards([10.0005, 0.0], [10.0, 0.0], ""), BOUNDS["fp32"], [10.0, 0.0])
    with pytest.raises(ParityError, match=r"differ by up to 0\.0002"):
        refuse_disagreement(compare_rewards([1.0002, 0.0], [1.0, 0.0], ""), BOUNDS["fp32"], [1.0, 0.0])


def test_fewer_bits_are_judged_by_the_order() -> None:
    """A wrong order is refused with its rank correlation and the way out; a shift of all is not."""
    refuse_disagreement(compare_rewards([value + 1 for value in REFERENCE], REFERENCE, ""), BOUNDS["int8"], REFERENCE)
    with pytest.raises(ParityError, match="--min-spearman"):
        refuse_disagreement(compare_rewards(REFERENCE[::-1], REFERENCE, ""), BOUNDS["int8"], REFERENCE)


@pytest.mark.parametrize("bounds", [Bounds(max_difference=1e9), Bounds(min_spearman=-1.0)])
def test_a_reward_that_is_no_number_meets_no_bound(bounds: Bounds) -> None:
    """NaN from a graph is refused however wide the bound."""
    with pytest.raises(ParityError, match="Nothing was written"):
        refuse_disagreement(compare_rewards([math.nan, *REFERENCE[1:]], REFERENCE, ""), bounds, REFERENCE)
