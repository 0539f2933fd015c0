"""How far several reviewers of the same pairs agree, and how accurate any model can look against such labels.

Pure: pairs with reviews in, numbers out. A model that knew exactly what most people prefer would still be called wrong
whenever a single reviewer slipped; that is the ceiling which an accuracy has to be read under.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.inter_rater import fleiss_kappa

from training.preferences import PreferencePair

_SIDES = ("first", "second", "tie")
_MIN_SHARED_PAIRS = 2


@dataclass(frozen=True, slots=True)
class AccuracyCeiling:
    """What a perfect model would score against these labels: between ``lower`` and ``upper``.

    Which, depends on how disagreement is spread over pairs: ``lower`` if it is concentrated on some, ``upper`` if every
    pair is equally noisy.
    """

    lower: float
    upper: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of reviewers on the pairs that at least two of them judged.

    ``observed``: probability that two reviewers of a pair say the same. ``krippendorff_alpha``: nominal, any number of
    reviewers a pair. ``fleiss_kappa``: None unless all pairs have equally many reviews. ``cohen_kappa``: mean over the
    pairs of reviewers who judged at least two pairs both, weighted by how many; None without any. ``single``: the
    ceiling against one reviewer's word; ``majority``: against the majority of ``reviews_per_pair`` of them.
    """

    num_pairs: int
    num_reviewers: int
    reviews_per_pair: float
    observed: float
    krippendorff_alpha: float
    fleiss_kappa: float | None
    cohen_kappa: float | None
    single: AccuracyCeiling
    majority: AccuracyCeiling


def measure_agreement(pairs: Iterable[PreferencePair]) -> Agreement | None:
    """Measure the agreement of the reviewers; None where no pair has two reviews."""
    reviewed = [_sides_by_reviewer(pair) for pair in pairs if len(pair.reviews) > 1]
    if not reviewed:
        return None
    tallies = [Counter(sides.values()) for sides in reviewed]
    decisive = _pairwise_agreement([_without_ties(tally) for tally in tallies])
    reviews_per_pair = sum(tally.total() for tally in tallies) / len(tallies)
    single = single_review_ceiling(decisive)
    num_votes = max(1, round(reviews_per_pair))
    return Agreement(
        num_pairs=len(reviewed),
        num_reviewers=len({reviewer for sides in reviewed for reviewer in sides}),
        reviews_per_pair=reviews_per_pair,
        observed=_pairwise_agreement(tallies),
        krippendorff_alpha=krippendorff_alpha(tallies),
        fleiss_kappa=_fleiss_kappa(tallies),
        cohen_kappa=_mean_cohen_kappa(reviewed),
        single=single,
        majority=AccuracyCeiling(*(majority_ceiling(bound, num_votes) for bound in (single.lower, single.upper))),
    )


def describe_agreement(agreement: Agreement) -> str:
    """Return one line for people: how far the reviewers agree, and what that allows."""
    ceiling = agreement.single
    return (
        f"{agreement.num_reviewers} reviewers of {agreement.num_pairs} pairs: two of them agree on "
        f"{agreement.observed:.1%} (Krippendorff's alpha {agreement.krippendorff_alpha:.2f}); a perfect model would "
        f"agree with one of them on {ceiling.lower:.1%} to {ceiling.upper:.1%}"
    )


def single_review_ceiling(observed: float) -> AccuracyCeiling:
    """Return the accuracy of a perfect model against single reviews, from the agreement of two independent ones.

    If a share q of all people prefers one side of a pair, two of them agree with probability q^2 + (1 - q)^2, and a
    model that always knows the preferred side agrees with one of them with probability m = max(q, 1 - q). The first
    equals (1 + (2m - 1)^2) / 2. So E[m] is at most (1 + sqrt(2 observed - 1)) / 2 (Jensen; reached when all pairs are
    equally disputed), and at least ``observed`` (reached when pairs are either clear or a coin flip).
    """
    if math.isnan(observed):
        return AccuracyCeiling(math.nan, math.nan)
    return AccuracyCeiling(max(observed, 0.5), (1 + math.sqrt(max(0.0, 2 * observed - 1))) / 2)


def majority_ceiling(single: float, num_votes: int) -> float:
    """Return the probability that a majority of independent reviewers finds the side that each finds with ``single``.

    An even split counts one half (Condorcet 1785).
    """
    if math.isnan(single):
        return math.nan
    half = num_votes / 2
    split = binom.pmf(half, num_votes, single) / 2 if num_votes % 2 == 0 else 0.0
    return float(binom.sf(math.floor(half), num_votes, single) + split)


def krippendorff_alpha(tallies: Sequence[Mapping[str, int]]) -> float:
    """Return Krippendorff's alpha for nominal data: 1 - observed disagreement / expected disagreement.

    Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section E. Units with one review do not count; NaN
    where all reviews are of one kind, since nothing could have disagreed.

    Args:
        tallies: for each unit, how many reviewers said what.
    """
    pairable = [tally for tally in tallies if sum(tally.values()) > 1]
    totals: Counter[str] = Counter()
    matching = 0.0
    for tally in pairable:
        totals.update(tally)
        matching += sum(count * (count - 1) for count in tally.values()) / (sum(tally.values()) - 1)
    num_reviews = totals.total()
    matching_by_chance = sum(count * (count - 1) for count in totals.values())
    if num_reviews * (num_reviews - 1) == matching_by_chance:
        return math.nan
    disagreement = 1 - matching / num_reviews
    return 1 - disagreement / (1 - matching_by_chance / (num_reviews * (num_reviews - 1)))


def _sides_by_reviewer(pair: PreferencePair) -> dict[str, str]:
    """Each reviewer's vote as a side that does not depend on the label.

    In terms of chosen and rejected nearly all reviews are "chosen", since the label was made from them; agreement by
    chance would then look high and every chance-corrected measure low. So the sides are named by a hash of the texts.
    """
    digest = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in (pair.chosen, pair.rejected)]
    chosen, rejected = ("first", "second") if digest[0] <= digest[1] else ("second", "first")
    names = {"chosen": chosen, "rejected": rejected, "tie": "tie"}
    return {review.reviewer: names[review.vote] for review in pair.reviews}


def _without_ties(tally: Counter[str]) -> Counter[str]:
    return Counter({side: count for side, count in tally.items() if side != "tie"})


def _pairwise_agreement(tallies: Sequence[Counter[str]]) -> float:
    shares = [
        sum(count * (count - 1) for count in tally.values()) / (tally.total() * (tally.total() - 1))
        for tally in tallies
        if tally.total() > 1
    ]
    return sum(shares) / len(shares) if shares else math.nan


def _fleiss_kappa(tallies: Sequence[Counter[str]]) -> float | None:
    if len({tally.total() for tally in tallies}) > 1 or len(set().union(*tallies)) < 2:
        return None
    return float(fleiss_kappa(np.array([[tally[side] for side in _SIDES] for tally in tallies])))


def _mean_cohen_kappa(reviewed: Sequence[Mapping[str, str]]) -> float | None:
    shared: defaultdict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for sides in reviewed:
        for left, right in itertools.combinations(sorted(sides), 2):
            shared[left, right].append((sides[left], sides[right]))
    kappas = [(_cohen_kappa(said), len(said)) for said in shared.values() if len(said) >= _MIN_SHARED_PAIRS]
    known = [(kappa, weight) for kappa, weight in kappas if not math.isnan(kappa)]
    if not known:
        return None
    return sum(kappa * weight for kappa, weight in known) / sum(weight for _, weight in known)


def _cohen_kappa(said: Sequence[tuple[str, str]]) -> float:
    if len({side for both in said for side in both}) < 2:
        return math.nan
    left, right = zip(*said, strict=True)
    return float(cohen_kappa_score(left, right))
