"""Agreement coefficients equal published examples, and the ceiling of accuracy holds for simulated annotators."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from training.annotator_agreement import (
    describe_annotator_agreement,
    krippendorff_alpha,
    majority_ceiling,
    measure_annotator_agreement,
    single_review_ceiling,
)
from training.preferences import PreferencePair, Review, Vote

KRIPPENDORFF_2011_E = ("111", "2232", "3333", "3333", "2222", "1234", "4444", "1121", "2222", "555", "11", "3")
"""The reliability data of section E: the values of twelve units by at most four observers."""


def reviewed(number: int, *votes: Vote) -> PreferencePair:
    reviews = tuple(Review(str(number_), vote) for number_, vote in enumerate(votes))
    return PreferencePair(f"prompt {number}", f"chosen {number}", f"rejected {number}", reviews=reviews)


def simulated_reviews(
    num_pairs: int, shares: np.ndarray, num_annotators: int, seed: int = 0
) -> tuple[list[PreferencePair], float]:
    """Return reviewed pairs, and how often a perfect model agrees with annotator 0.

    A share of all people, drawn from ``shares`` for each pair, prefers its first side.
    """
    rng = np.random.default_rng(seed)
    share = rng.choice(shares, num_pairs)
    prefers_first = rng.random((num_pairs, num_annotators)) < share[:, None]
    votes: list[list[Vote]] = [["chosen" if first else "rejected" for first in row] for row in prefers_first]
    agrees = np.where(share >= 0.5, prefers_first[:, 0], ~prefers_first[:, 0])
    return [reviewed(number, *row) for number, row in enumerate(votes)], float(agrees.mean())


def test_krippendorffs_own_example() -> None:
    """Four observers, twelve units, missing values: the paper gives 0.743 for nominal data."""
    alpha = krippendorff_alpha([Counter(unit) for unit in KRIPPENDORFF_2011_E])

    assert alpha == pytest.approx(0.743, abs=5e-4)


def test_unanimous_annotators_agree_fully() -> None:
    """Equal votes on every pair: all coefficients are 1, and so is the ceiling."""
    agreement = measure_annotator_agreement(reviewed(number, "chosen", "chosen", "chosen") for number in range(40))

    assert agreement is not None
    assert agreement.observed == agreement.single.lower == agreement.single.upper == 1.0
    assert agreement.krippendorff_alpha == pytest.approx(1.0)
    assert agreement.fleiss_kappa == pytest.approx(1.0)
    assert agreement.cohen_kappa == pytest.approx(1.0)


def test_random_votes_have_no_agreement() -> None:
    """Chance-corrected coefficients are near 0, and the ceiling is near one half."""
    pairs, _ = simulated_reviews(2000, np.array([0.5]), num_annotators=3)

    agreement = measure_annotator_agreement(pairs)

    assert agreement is not None
    assert agreement.krippendorff_alpha == pytest.approx(0.0, abs=0.05)
    assert agreement.fleiss_kappa == pytest.approx(0.0, abs=0.05)
    assert agreement.cohen_kappa == pytest.approx(0.0, abs=0.05)
    assert agreement.single.upper < 0.62


@pytest.mark.parametrize("shares", [[0.8], [0.2, 0.8], [0.5, 1.0], [0.55, 0.7, 0.95]], ids=str)
def test_a_perfect_model_is_within_the_bounds(shares: list[float]) -> None:
    """However disagreement is distributed over pairs, the best possible accuracy is between the two bounds."""
    pairs, best = simulated_reviews(20_000, np.array(shares), num_annotators=2)

    agreement = measure_annotator_agreement(pairs)

    assert agreement is not None
    assert agreement.single.lower - 0.01 < best < agreement.single.upper + 0.01


def test_the_bounds_are_reached() -> None:
    """Equal noise on all pairs gives the upper bound, coin flips among undisputed pairs give the lower one."""
    equal_noise = single_review_ceiling(0.8**2 + 0.2**2)
    coin_flips = single_review_ceiling((0.5 + 1.0) / 2)

    assert equal_noise.upper == pytest.approx(0.8)
    assert coin_flips.lower == pytest.approx((0.5 + 1.0) / 2)


def test_a_majority_has_a_higher_ceiling_than_one_annotator() -> None:
    """Condorcet: a majority of three annotators of 0.8 is right with 0.896; an even split counts one half."""
    assert majority_ceiling(0.8, 3) == pytest.approx(0.8**3 + 3 * 0.8**2 * 0.2)
    assert majority_ceiling(0.8, 2) == pytest.approx(0.8)
    assert majority_ceiling(0.8, 1) == pytest.approx(0.8)


def test_labels_derived_from_the_reviews_do_not_lower_alpha() -> None:
    """Nearly all votes are "chosen", because the label was derived from them; alpha is high all the same."""
    same: tuple[Vote, Vote] = ("chosen", "chosen")
    different: tuple[Vote, Vote] = ("chosen", "rejected")
    votes = [same] * 95 + [different] * 5

    agreement = measure_annotator_agreement(reviewed(number, *both) for number, both in enumerate(votes))

    assert agreement is not None
    assert agreement.observed == 0.95
    assert agreement.krippendorff_alpha == pytest.approx(0.9, abs=0.02)
    assert "2 annotators of 100 pairs: two of them agree on 95.0%" in describe_annotator_agreement(agreement)


def test_single_reviews_have_no_agreement() -> None:
    """Without a pair with two reviews the result is None; where all votes are equal, alpha is NaN."""
    assert measure_annotator_agreement([reviewed(0, "chosen"), reviewed(1)]) is None
    assert math.isnan(krippendorff_alpha([Counter("aa"), Counter("aa")]))
