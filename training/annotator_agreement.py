"""Inter-annotator agreement, and the accuracy that a perfect model can reach against such labels.

Pure: it takes pairs with reviews and returns figures. A review is one annotator's vote on a pair. A model that always
predicts what most people prefer is still counted as wrong where a single annotator made a mistake; that limits the
accuracy that can be measured.
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
    """Bounds of the accuracy of a perfect model against these labels.

    Where between them it lies depends on how disagreement is distributed over pairs.
    """

    lower: float
    """If disagreement is concentrated on some pairs, which are then a coin flip."""

    upper: float
    """If every pair is equally noisy."""


@dataclass(frozen=True, slots=True)
class AnnotatorAgreement:
    """Agreement of the annotators on the pairs with at least two reviews."""

    num_pairs: int
    num_annotators: int

    reviews_per_pair: float
    """Mean number."""

    observed: float
    """Probability that two annotators of a pair give the same vote."""

    krippendorff_alpha: float
    """For nominal data and any number of annotators a pair; NaN where all votes are equal."""

    fleiss_kappa: float | None
    """None unless all pairs have equally many reviews."""

    cohen_kappa: float | None
    """Mean over the pairs of annotators with at least two preference pairs in common, weighted by their number; None
    where there are none."""

    single: AccuracyCeiling
    """Of the accuracy against the vote of one annotator."""

    majority: AccuracyCeiling
    """Of the accuracy against the majority of ``reviews_per_pair`` annotators."""


def measure_annotator_agreement(pairs: Iterable[PreferencePair]) -> AnnotatorAgreement | None:
    """Compute the agreement of the annotators; None where no pair has two reviews."""
    reviewed = [_sides_by_annotator(pair) for pair in pairs if len(pair.reviews) > 1]
    if not reviewed:
        return None
    tallies = [Counter(sides.values()) for sides in reviewed]
    decisive = _pairwise_agreement([_without_ties(tally) for tally in tallies])
    reviews_per_pair = sum(tally.total() for tally in tallies) / len(tallies)
    single = single_review_ceiling(decisive)
    num_votes = max(1, round(reviews_per_pair))
    return AnnotatorAgreement(
        num_pairs=len(reviewed),
        num_annotators=len({annotator for sides in reviewed for annotator in sides}),
        reviews_per_pair=reviews_per_pair,
        observed=_pairwise_agreement(tallies),
        krippendorff_alpha=krippendorff_alpha(tallies),
        fleiss_kappa=_fleiss_kappa(tallies),
        cohen_kappa=_mean_cohen_kappa(reviewed),
        single=single,
        majority=AccuracyCeiling(*(majority_ceiling(bound, num_votes) for bound in (single.lower, single.upper))),
    )


def describe_annotator_agreement(agreement: AnnotatorAgreement) -> str:
    """Return one line of text: the observed agreement and the ceiling that follows from it."""
    ceiling = agreement.single
    return (
        f"{agreement.num_annotators} annotators of {agreement.num_pairs} pairs: two of them agree on "
        f"{agreement.observed:.1%} (Krippendorff's alpha {agreement.krippendorff_alpha:.2f}); a perfect model would "
        f"agree with one of them on {ceiling.lower:.1%} to {ceiling.upper:.1%}"
    )


def single_review_ceiling(observed: float) -> AccuracyCeiling:
    """Return the accuracy of a perfect model against single reviews, from the agreement of two independent ones.

    If a share q of all people prefers one side of a pair, two of them agree with probability q^2 + (1 - q)^2, and a
    model that always predicts the preferred side agrees with one of them with probability m = max(q, 1 - q). The first
    equals (1 + (2m - 1)^2) / 2. So E[m] is at most (1 + sqrt(2 observed - 1)) / 2 (Jensen's inequality; equality when
    all pairs are equally disputed), and at least ``observed`` (equality when each pair is either undisputed or a coin
    flip).
    """
    if math.isnan(observed):
        return AccuracyCeiling(math.nan, math.nan)
    return AccuracyCeiling(max(observed, 0.5), (1 + math.sqrt(max(0.0, 2 * observed - 1))) / 2)


def majority_ceiling(single: float, num_votes: int) -> float:
    """Return the probability that a majority of independent annotators votes for the preferred side.

    Each of them votes for it with probability ``single``; an even split counts one half (Condorcet 1785).
    """
    if math.isnan(single):
        return math.nan
    half = num_votes / 2
    split = binom.pmf(half, num_votes, single) / 2 if num_votes % 2 == 0 else 0.0
    return float(binom.sf(math.floor(half), num_votes, single) + split)


def krippendorff_alpha(tallies: Sequence[Mapping[str, int]]) -> float:
    """Return Krippendorff's alpha for nominal data: 1 - observed disagreement / expected disagreement.

    Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section E. Units with one review do not count. NaN
    where all votes are equal, since the expected disagreement is then zero.

    Args:
        tallies: for each unit, the number of annotators by vote.
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


def _sides_by_annotator(pair: PreferencePair) -> dict[str, str]:
    """Return each annotator's vote as a side that does not depend on the label.

    In terms of chosen and rejected nearly all votes are "chosen", because the label was derived from them; the expected
    agreement would then be high and every chance-corrected coefficient low. So the sides are ordered by a hash of the
    texts.
    """
    digest = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in pair.serialized]
    chosen, rejected = ("first", "second") if digest[0] <= digest[1] else ("second", "first")
    names = {"chosen": chosen, "rejected": rejected, "tie": "tie"}
    return {review.annotator: names[review.vote] for review in pair.reviews}


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
    kappas = [(_cohen_kappa(votes), len(votes)) for votes in shared.values() if len(votes) >= _MIN_SHARED_PAIRS]
    defined = [(kappa, weight) for kappa, weight in kappas if not math.isnan(kappa)]
    if not defined:
        return None
    return sum(kappa * weight for kappa, weight in defined) / sum(weight for _, weight in defined)


def _cohen_kappa(votes: Sequence[tuple[str, str]]) -> float:
    if len({side for both in votes for side in both}) < 2:
        return math.nan
    left, right = zip(*votes, strict=True)
    return float(cohen_kappa_score(left, right))
