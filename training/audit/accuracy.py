"""Accuracy of the model on human preferences, beside that of preferring the longer completion on the same pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from training.audit.intervals import Interval, bootstrap_interval, share_interval
from training.audit.scored_pairs import FloatArray, IntArray, ScoredPairs

LENGTH_RATIOS = (0.0, 0.5, 0.8, 1.25, 2.0, np.inf)
"""Edges of the buckets: length of the chosen completion divided by that of the rejected one."""

BUCKET_NAMES = ("under 1/2", "1/2 to 4/5", "about equal", "5/4 to 2", "over 2")


@dataclass(frozen=True, slots=True)
class SubsetAccuracy:
    """Accuracy on some of the pairs."""

    name: str
    num_pairs: int
    accuracy: Interval

    longer_wins: Interval
    """Accuracy of preferring the longer completion on the same pairs."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Agreement of the rewards with human preferences."""

    num_pairs: int
    num_prompts: int
    accuracy: Interval

    longer_wins: Interval
    """Accuracy of preferring the longer completion."""

    above_length: Interval
    """``accuracy`` minus ``longer_wins``."""

    prefers_longer: Interval
    """Share of the pairs of unequal length in which the model prefers the longer completion, whatever people chose."""

    balanced: Interval
    """Mean of the accuracies on the pairs whose longer and on those whose shorter completion was chosen; one half for
    any rule that depends on length alone."""

    by_source: Sequence[SubsetAccuracy]

    by_length_ratio: Sequence[SubsetAccuracy]
    """By the length of the chosen completion divided by that of the rejected one."""


def measure_accuracy(scored: ScoredPairs) -> Accuracy:
    """Compute how often the chosen completion has the higher reward; a tie counts one half."""
    wins, longer, prompts = wins_of(scored.gaps), wins_of(scored.length_gaps), scored.prompts
    unequal = scored.length_gaps != 0
    preferred_longer = np.where(longer > 0.5, wins, 1 - wins)[unequal]
    return Accuracy(
        num_pairs=len(scored),
        num_prompts=len(np.unique(prompts)),
        accuracy=share_interval(wins, prompts),
        longer_wins=share_interval(longer, prompts),
        above_length=bootstrap_interval(lambda indices: float((wins - longer)[indices].mean()), prompts),
        prefers_longer=share_interval(preferred_longer, prompts[unequal]),
        balanced=_balanced(wins, longer, prompts),
        by_source=_by_source(scored),
        by_length_ratio=_by_length_ratio(scored),
    )


def wins_of(gaps: FloatArray) -> FloatArray:
    """Return 1 for a positive gap, 0 for a negative one, one half for a tie."""
    return np.asarray((np.sign(gaps) + 1) / 2)


def _balanced(wins: FloatArray, longer: FloatArray, prompts: IntArray) -> Interval:
    def mean_of_both(indices: IntArray) -> float:
        sides = [wins[indices][longer[indices] == side] for side in (0.0, 1.0)]
        return float(np.mean([side.mean() for side in sides])) if all(len(side) for side in sides) else np.nan

    return bootstrap_interval(mean_of_both, prompts)


def _by_source(scored: ScoredPairs) -> list[SubsetAccuracy]:
    sources = np.array([pair.source or "unnamed" for pair in scored.pairs])
    return [_accuracy_of(str(name), scored.select(sources == name)) for name in np.unique(sources)]


def _by_length_ratio(scored: ScoredPairs) -> list[SubsetAccuracy]:
    ratios = (scored.chosen_lengths + 1) / (scored.rejected_lengths + 1)
    buckets = [(ratios >= low) & (ratios < high) for low, high in pairwise(LENGTH_RATIOS)]
    return [_accuracy_of(name, scored.select(mask)) for name, mask in zip(BUCKET_NAMES, buckets, strict=True)]


def _accuracy_of(name: str, part: ScoredPairs) -> SubsetAccuracy:
    return SubsetAccuracy(
        name=name,
        num_pairs=len(part),
        accuracy=share_interval(wins_of(part.gaps), part.prompts),
        longer_wins=share_interval(wins_of(part.length_gaps), part.prompts),
    )
