"""Surprisal of a completion's tokens under unigram and bigram counts of the calibration's texts.

A count table, not a language model: it separates random tokens and shuffled words from text, and costs microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

WINDOW_TOKENS = 1024
"""Leading completion tokens over which token statistics are computed."""

NUM_SLOTS = 1 << 22
"""Slots of the hash table of token pairs."""

_MULTIPLIER = 1_000_003
_PRIOR_WEIGHT = 2.0
_FLOOR = 1e-12
_MAX_COUNT = np.iinfo(np.uint16).max


class NgramCounts:
    """Counts of tokens and of hashed token pairs.

    Args:
        unigrams: uint32 [vocabulary].
        slots: occupied slots of `NUM_SLOTS`, uint32 [pairs].
        counts: number of pairs hashed to each occupied slot, saturating, uint16 [pairs].
    """

    def __init__(self, unigrams: NDArray[np.uint32], slots: NDArray[np.uint32], counts: NDArray[np.uint16]) -> None:
        self.unigrams, self.slots, self.counts = unigrams, slots, counts
        self._probability = (unigrams + 1.0) / (unigrams.sum(dtype=np.float64) + len(unigrams))
        self._surprisal = -np.log(self._probability)
        self._before = unigrams + _PRIOR_WEIGHT
        self._pairs = np.zeros(NUM_SLOTS, np.uint16)
        self._pairs[slots] = counts

    @classmethod
    def of(cls, texts: Iterable[tuple[int, ...]], vocab_size: int) -> NgramCounts:
        """Count the tokens of texts; ids are below ``vocab_size``."""
        unigrams = np.zeros(vocab_size, np.uint32)
        pairs = np.zeros(NUM_SLOTS, np.uint32)
        for text in texts:
            ids = np.array(text[:WINDOW_TOKENS], np.int64)
            np.add.at(unigrams, ids, 1)
            np.add.at(pairs, _slots(ids), 1)
        slots = np.flatnonzero(pairs)
        return cls(unigrams, slots.astype(np.uint32), np.minimum(pairs[slots], _MAX_COUNT).astype(np.uint16))

    def surprisal(self, ids: tuple[int, ...]) -> tuple[float, float]:
        """Return the mean -ln p of the tokens, and of each token given the previous one; 0 where there are none.

        Unigrams have add-one smoothing; a pair is interpolated with the unigram, which weighs as much as two
        observations (Dirichlet prior, MacKay and Peto, 1995).
        """
        window = np.array(ids[:WINDOW_TOKENS], np.int64)
        if not window.size:
            return 0.0, 0.0
        uni = float(self._surprisal[window].mean())
        if window.size < 2:
            return uni, 0.0
        numerator = self._pairs[_slots(window)] + _PRIOR_WEIGHT * self._probability[window[1:]]
        return uni, float(-np.log(numerator / self._before[window[:-1]] + _FLOOR).mean())


def _slots(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the slot of each pair of adjacent tokens, int64 [tokens - 1]."""
    return (_MULTIPLIER * ids[:-1] + ids[1:]) % NUM_SLOTS
