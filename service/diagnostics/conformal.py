"""Conformal p-values, and a common scale on which the scores of different detectors can be compared.

Pure arithmetic on sorted lists of scores. A p-value is always a rank among calibration items that no detector was
fitted to, so its false-alarm rate holds for any distribution of scores (Vovk, Gammerman and Shafer, Algorithmic
Learning in a Random World, 2005; split conformal prediction). An exponential tail is assumed only to order scores
beyond the largest calibration score, where every rank is the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
Matrix = NDArray[np.float64]

MAX_QUANTILES = 1024
"""Values of a reference that are stored; a longer list is reduced to this many quantiles."""


def conformal_p(reference: Scores, scores: Scores) -> Scores:
    """Return ``(1 + #{reference >= score}) / (n + 1)`` for each score; NaN ranks above every reference score.

    Args:
        reference: sorted scores of calibration items, float64 [n].
        scores: scores of the items to test, higher is more unusual, float64 [items].
    """
    num_as_unusual = len(reference) - np.searchsorted(reference, scores, side="left")
    return np.asarray((1.0 + num_as_unusual) / (len(reference) + 1.0))


@dataclass(frozen=True, eq=False)
class TailMap:
    """Maps a detector's scores to -ln p: by rank within a reference, and by an exponential tail above it.

    By rank it is -ln of the conformal p-value. Above the threshold u, the ``num_tail``-th largest value, it is at least
    ``-ln(num_tail / n) + (v - u) / scale`` (peaks over threshold with an exponential tail).
    """

    reference: Scores = field(repr=False)
    """Sorted scores of the reference items, or quantiles of them."""

    num_reference: int
    """Number of reference items that ``reference`` summarises."""

    num_tail: int
    """Number of items at or above the threshold."""

    threshold: float
    """Score at which the tail begins."""

    scale: float
    """Mean excess of the tail over the threshold; 0 where all its values are equal."""

    max_excess: float
    """Upper limit of ``(v - u) / scale``."""

    @classmethod
    def of_component(cls, scores: Scores) -> TailMap:
        """Fit the map of a component of the combination; the tail holds 5 percent of the items, at least 30."""
        return cls._fit(scores, max(30, len(scores) // 20), 0.0, 1000.0)

    @classmethod
    def of_test(cls, values: Scores) -> TailMap:
        """Fit the map of a one-sided test of one statistic; the tail holds 2 percent of the items, at least 20.

        Many statistics hardly vary (no emoji in any item), so the tail's scale has a lower limit and its excess an
        upper one.
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
        return self._as_maps(scores[:, None])[:, 0]

    @cached_property
    def _as_maps(self) -> TailMaps:
        return TailMaps([self])

    @property
    def by_rank(self) -> Scores:
        """-ln p of a score by the number of reference scores below it, float64 [reference + 1]."""
        share = 1.0 - np.arange(len(self.reference) + 1) / len(self.reference)
        return np.asarray(-np.log((1.0 + self.num_reference * share) / (self.num_reference + 1.0)))


class TailMaps:
    """Several `TailMap`, each for one column of scores, applied at once.

    Args:
        maps: at least one.
    """

    def __init__(self, maps: Sequence[TailMap]) -> None:
        self._references = [one.reference for one in maps]
        self._by_rank = np.concatenate([one.by_rank for one in maps])
        sizes = np.array([len(one.reference) + 1 for one in maps])
        self._begins = np.cumsum(sizes) - sizes
        self._threshold = np.array([one.threshold for one in maps])
        self._at_threshold = np.array([-math.log(one.num_tail / one.num_reference) for one in maps])
        self._has_scale = np.array([bool(one.scale) for one in maps])
        self._scale = np.array([one.scale or 1.0 for one in maps])
        self._max_excess = np.array([one.max_excess for one in maps])

    def __call__(self, scores: Matrix) -> Matrix:
        """Return -ln p of each column by its map, float64 [items, maps]."""
        columns = np.ascontiguousarray(scores.T)
        ranks = np.empty(columns.shape, np.intp)
        for row, reference, column in zip(ranks, self._references, columns, strict=True):
            row[:] = reference.searchsorted(column)
        by_rank = self._by_rank[ranks.T + self._begins]
        is_beyond = scores > self._threshold
        excess = np.where(is_beyond, scores - self._threshold, 0.0)
        ratio = np.where(self._has_scale, excess / self._scale, np.where(is_beyond, math.inf, 0.0))
        by_tail = np.where(is_beyond, self._at_threshold + np.minimum(ratio, self._max_excess), 0.0)
        return np.asarray(np.maximum(by_rank, by_tail))


def thinned(ordered: Scores) -> Scores:
    """Return sorted values, reduced to `MAX_QUANTILES` quantiles where there are more; both ends are retained."""
    if len(ordered) <= MAX_QUANTILES:
        return ordered
    indices = np.round(np.linspace(0, len(ordered) - 1, MAX_QUANTILES)).astype(int)
    return np.asarray(ordered[indices])
