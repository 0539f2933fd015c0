"""Ranks among calibration items: conformal p-values, and a common scale on which detectors can be compared.

Pure arithmetic on sorted score lists. A p-value is always a rank among items that no detector was fitted to; nothing
here assumes a distribution, except to order what lies beyond every item of the list.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]

MAX_QUANTILES = 1024
"""Values of a reference that are kept; a longer list is thinned to its quantiles."""


def conformal_p(reference: Scores, scores: Scores) -> Scores:
    """Return ``(1 + #{reference >= score}) / (n + 1)`` for each score; NaN counts as beyond everything.

    Args:
        reference: sorted scores of calibration items, float64 [n].
        scores: of the items in question, higher is more unusual, float64 [items].
    """
    num_as_unusual = len(reference) - np.searchsorted(reference, scores, side="left")
    return np.asarray((1.0 + num_as_unusual) / (len(reference) + 1.0))


class TailMap:
    """Maps a detector's scores to -ln p, by rank within a reference and by an exponential tail beyond it.

    Within the reference it is -ln of the conformal p. Above the threshold u, the ``num_tail``-th largest value, it is
    ``-ln(num_tail / n) + (v - u) / scale``, but never less than the rank says.

    Args:
        reference: sorted scores of reference items, or quantiles of them.
        num_reference: how many items that stands for.
        num_tail: items at or above the threshold.
        threshold: where the tail begins.
        scale: mean excess of the tail over the threshold; 0 where it has no spread.
        max_excess: where ``(v - u) / scale`` is cut off.
    """

    def __init__(
        self,
        reference: Scores,
        *,
        num_reference: int,
        num_tail: int,
        threshold: float,
        scale: float,
        max_excess: float,
    ) -> None:
        self.reference = reference
        self.num_reference = num_reference
        self.num_tail = num_tail
        self.threshold = threshold
        self.scale = scale
        self.max_excess = max_excess

    @classmethod
    def of_component(cls, scores: Scores) -> TailMap:
        """Fit the map of a component of the combination; the tail holds a twentieth of the items, at least 30."""
        return cls._fit(scores, max(30, len(scores) // 20), 0.0, 1000.0)

    @classmethod
    def of_test(cls, values: Scores) -> TailMap:
        """Fit the map of a one-sided test of one statistic.

        Many statistics hardly vary (no emoji anywhere), so the tail's scale has a floor and its excess a ceiling.
        """
        floor = float(np.max(values) - np.median(values)) / 50
        return cls._fit(values, max(20, len(values) // 50), floor, 30.0)

    @classmethod
    def _fit(cls, scores: Scores, num_tail: int, floor: float, max_excess: float) -> TailMap:
        ordered = np.sort(scores)
        num_tail = min(num_tail, len(ordered))
        threshold = float(ordered[-num_tail])
        scale = max(float((ordered[-num_tail:] - threshold).mean()), floor)
        return cls(
            thinned(ordered),
            num_reference=len(ordered),
            num_tail=num_tail,
            threshold=threshold,
            scale=scale,
            max_excess=max_excess,
        )

    def __call__(self, scores: Scores) -> Scores:
        """Return -ln p for each score, float64 [items]."""
        share = 1.0 - np.searchsorted(self.reference, scores, side="left") / len(self.reference)
        by_rank = -np.log((1.0 + self.num_reference * share) / (self.num_reference + 1.0))
        is_beyond = scores > self.threshold
        excess = np.where(is_beyond, scores - self.threshold, 0.0)
        ratio = excess / self.scale if self.scale else np.where(is_beyond, math.inf, 0.0)
        at_threshold = -math.log(self.num_tail / self.num_reference)
        by_tail = np.where(is_beyond, at_threshold + np.minimum(ratio, self.max_excess), 0.0)
        return np.asarray(np.maximum(by_rank, by_tail))


def thinned(ordered: Scores) -> Scores:
    """Return sorted values, as their quantiles where there are more than `MAX_QUANTILES`; both ends stay."""
    if len(ordered) <= MAX_QUANTILES:
        return ordered
    places = np.round(np.linspace(0, len(ordered) - 1, MAX_QUANTILES)).astype(int)
    return np.asarray(ordered[places])
