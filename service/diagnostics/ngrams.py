"""Surprisal of a completion's tokens under unigram and bigram counts of the calibration's texts.

A count table, not a language model: it separates random tokens and shuffled words from text, and costs microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WINDOW_TOKENS = 1024
"""Leading completion tokens over which token statistics are computed."""

PASSAGE_TOKENS = 12
"""Tokens of a passage: as many as a short sentence has."""

NUM_SLOTS = 1 << 22
"""Slots of the hash table of token pairs."""

_MULTIPLIER = 1_000_003
_PRIOR_WEIGHT = 2.0
_FLOOR = 1e-12
_MAX_COUNT = np.iinfo(np.uint16).max


class Surprisal(NamedTuple):
    """Surprisal (-ln p) of the tokens of a text."""

    uni: float = 0.0
    """Mean under the unigram counts."""

    bi: float = 0.0
    """Mean of each token given the previous one."""

    uni_peak: float = 0.0
    """Mean ``uni`` of the most surprising passage, less that of the text."""

    bi_peak: float = 0.0
    """Mean ``bi`` of the most surprising passage, less that of the text."""

    uni_dip: float = 0.0
    """Mean ``uni`` of the text, less that of the least surprising passage."""


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
        found = self.surprisals(ids)
        return found.uni, found.bi

    def surprisals(self, ids: tuple[int, ...]) -> Surprisal:
        """Return the mean surprisals of `surprisal`, and how far the most and least surprising passages are from them.

        A passage is `PASSAGE_TOKENS` consecutive tokens, so a few odd words in a long text are seen; a text that is not
        longer than one has differences of 0.
        """
        window = np.array(ids[:WINDOW_TOKENS], np.int64)
        if not window.size:
            return Surprisal()
        uni = self._surprisal[window]
        if window.size < 2:
            return Surprisal(float(uni.mean()))
        numerator = self._pairs[_slots(window)] + _PRIOR_WEIGHT * self._probability[window[1:]]
        bi = -np.log(numerator / self._before[window[:-1]] + _FLOOR)
        uni_mean, bi_mean = float(uni.mean()), float(bi.mean())
        uni_passages, bi_passages = _passage_means(uni), _passage_means(bi)
        return Surprisal(
            uni_mean,
            bi_mean,
            float(uni_passages.max()) - uni_mean,
            float(bi_passages.max()) - bi_mean,
            uni_mean - float(uni_passages.min()),
        )


def _passage_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of every `PASSAGE_TOKENS` consecutive values, or of all if there are not more."""
    if len(values) <= PASSAGE_TOKENS:
        return np.array([values.mean()])
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return np.asarray((sums[PASSAGE_TOKENS:] - sums[:-PASSAGE_TOKENS]) / PASSAGE_TOKENS)


def _slots(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the slot of each pair of adjacent tokens, int64 [tokens - 1]."""
    return (_MULTIPLIER * ids[:-1] + ids[1:]) % NUM_SLOTS
