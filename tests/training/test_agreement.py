"""Agreement of reviewers against published examples, and the ceiling it implies against simulated reviewers."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from training.agreement import (
    describe_agreement,
    krippendorff_alpha,
    majority_ceiling,
    measure_agreement,
    single_review_ceiling,
)
from training.preferences import PreferencePair, Review, Vote

KRIPPENDORFF_2011_E = ("111", "2232", "3333", "3333", "2222", "1234", "4444", "1121", "2222", "555", "11", "3")
"""The reliability data of section E: what each of twelve units got from at most four observers."""


def reviewed(number: int, *votes: Vote) -> PreferencePair:
    reviews = tuple(Review(str(place), vote) for place, vote in enumerate(votes))
    return PreferencePair(f"prompt {number}", f"chosen {number}", f"rejected {number}", reviews=reviews)


def simulated_reviews(
    num_pairs: int, shares: np.ndarray, num_reviewers: int, seed: int = 0
) -> tuple[list[PreferencePair], float]:
    """Pairs whose first side a share of all people prefers, and how often a perfect model agrees with reviewer 0."""
    rng = np.random.default_rng(seed)
    share = rng.choice(shares, num_pairs)
    prefers_first = rng.random((num_pairs, num_reviewers)) < share[:, None]
    votes: list[list[Vote]] = [["chosen" if said else "rejected" for said in row] for row in prefers_first]
    agrees = np.where(share >= 0.5, prefers_first[:, 0], ~prefers_first[:, 0])
    return [reviewed(number, *row) for number, row in enumerate(votes)], float(agrees.mean())


def test_krippendorffs_own_example() -> None:
    """Four observers, twelve units, values missing: the paper gives 0.743 for nominal data."""
    alpha = krippendorff_alpha([Counter(unit) for unit in KRIPPENDORFF_2011_E])

    assert alpha == pytest.approx(0.743, abs=5e-4)


def test_unanimous_reviewers_agree_fully() -> None:
    """One reviewer of a kind only, or always the same answer: agreement is whole, and nothing limits a model."""
    agreement = measure_agreement(reviewed(number, "chosen", "chosen", "chosen") for number in range(40))

    assert agreement is not None
    assert agreement.observed == agreement.single.lower == agreement.single.upper == 1.0
    assert agreement.krippendorff_alpha == pytest.approx(1.0)
    assert agreement.fleiss_kappa == pytest.approx(1.0)
    assert agreement.cohen_kappa == pytest.approx(1.0)


def test_reviewers_who_toss_coins_do_not_agree() -> None:
    """Chance-corrected measures are near zero, the ceiling near one half."""
    pairs, _ = simulated_reviews(2000, np.array([0.5]), num_reviewers=3)

    agreement = measure_agreement(pairs)

    assert agreement is not None
    assert agreement.krippendorff_alpha == pytest.approx(0.0, abs=0.05)
    assert agreement.fleiss_kappa == pytest.approx(0.0, abs=0.05)
    assert agreement.cohen_kappa == pytest.approx(0.0, abs=0.05)
    assert agreement.single.upper < 0.62


@pytest.mark.parametrize("shares", [[0.8], [0.2, 0.8], [0.5, 1.0], [0.55, 0.7, 0.95]], ids=str)
def test_the_ceiling_holds_what_a_perfect_model_reaches(shares: list[float]) -> None:
    """Whatever the spread of disagreement, the best possible accuracy lies between the two bounds."""
    pairs, best = simulated_reviews(20_000, np.array(shares), num_reviewers=2)

    agreement = measure_agreement(pairs)

    assert agreement is not None
    assert agreement.single.lower - 0.01 < best < agreement.single.upper + 0.01


def test_the_bounds_are_reached() -> None:
    """Equal noise gives the upper bound, coin flips among clear pairs the lower one."""
    equal_noise = single_review_ceiling(0.8**2 + 0.2**2)
    coins_among_clear = single_review_ceiling((0.5 + 1.0) / 2)

    assert equal_noise.upper == pytest.approx(0.8)
    assert coins_among_clear.lower == pytest.approx((0.5 + 1.0) / 2)


def test_a_majority_is_wiser_than_one() -> None:
    """Condorcet: three reviewers of 0.8 find the better side with 0.896; an even split is a coin."""
    assert majority_ceiling(0.8, 3) == pytest.approx(0.8**3 + 3 * 0.8**2 * 0.2)
    assert majority_ceiling(0.8, 2) == pytest.approx(0.8)
    assert majority_ceiling(0.8, 1) == pytest.approx(0.8)


def test_labels_made_of_the_reviews_do_not_hide_agreement() -> None:
    """Nearly all reviews say "chosen", since the label came from them; alpha is as high as the reviewers deserve."""
    same: tuple[Vote, Vote] = ("chosen", "chosen")
    different: tuple[Vote, Vote] = ("chosen", "rejected")
    votes = [same] * 95 + [different] * 5

    agreement = measure_agreement(reviewed(number, *both) for number, both in enumerate(votes))

    assert agreement is not None
    assert agreement.observed == 0.95
    assert agreement.krippendorff_alpha == pytest.approx(0.9, abs=0.02)
    assert "2 reviewers of 100 pairs: two of them agree on 95.0%" in describe_agreement(agreement)


def test_single_reviews_say_nothing() -> None:
    """No pair with two reviews, no agreement; and reviews of one kind alone leave alpha open."""
    assert measure_agreement([reviewed(0, "chosen"), reviewed(1)]) is None
    assert math.isnan(krippendorff_alpha([Counter("aa"), Counter("aa")]))
