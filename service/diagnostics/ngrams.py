"""Surprisal of a completion's tokens under unigram and bigram counts of the calibration's texts.

A count table, not a language model: it separates random tokens and shuffled words from text, and costs microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
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
        return self.surprisals_of([ids])[0]

    def surprisals_of(self, texts: Sequence[tuple[int, ...]]) -> list[Surprisal]:
        """Return the `surprisals` of each text; those of many short texts cost little more than those of one."""
        windows = [ids[:WINDOW_TOKENS] for ids in texts]
        sizes = np.array([len(window) for window in windows], np.int64)
        tokens = np.fromiter(chain.from_iterable(windows), np.int64, int(sizes.sum()))
        uni, bi = self._surprisal[tokens], np.zeros(len(tokens))  # of a text's last token there is no pair
        if len(tokens) > 1:
            numerator = self._pairs[_slots(tokens)] + _PRIOR_WEIGHT * self._probability[tokens[1:]]
            bi[:-1] = -np.log(numerator / self._before[tokens[:-1]] + _FLOOR)
        ends = np.cumsum(sizes)
        bounds = list(zip((ends - sizes).tolist(), ends.tolist(), strict=True))
        uni_means = [_mean(uni[begin:end]) for begin, end in bounds]
        bi_means = [_mean(bi[begin : end - 1]) if end > begin else 0.0 for begin, end in bounds]
        uni_high, uni_low = _passages(uni, sizes, sizes, uni_means)
        bi_high, _ = _passages(bi, sizes, np.maximum(sizes - 1, 0), bi_means)
        return [
            Surprisal(uni_mean, bi_mean, uni_peak - uni_mean, bi_peak - bi_mean, uni_mean - uni_dip)
            for uni_mean, bi_mean, uni_peak, bi_peak, uni_dip in zip(
                uni_means, bi_means, uni_high, bi_high, uni_low, strict=True
            )
        ]


def _mean(values: NDArray[np.float64]) -> float:
    return float(np.add.reduce(values)) / len(values) if len(values) else 0.0


def _passages(
    values: NDArray[np.float64], sizes: NDArray[np.int64], known: NDArray[np.int64], means: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Return the largest and the smallest mean of `PASSAGE_TOKENS` consecutive values of each text.

    Args:
        values: of the tokens of all texts.
        sizes: tokens of each text.
        known: the first values of each text that count.
        means: of these; returned where a text has no more of them than a passage.
    """
    longest = int(sizes.max(initial=0))
    if longest <= PASSAGE_TOKENS:
        return list(means), list(means)
    sums = np.zeros((len(sizes), 1 + longest))
    sums[:, 1:][np.arange(longest) < sizes[:, None]] = values
    np.cumsum(sums, axis=1, out=sums)
    passages = (sums[:, PASSAGE_TOKENS:] - sums[:, :-PASSAGE_TOKENS]) / PASSAGE_TOKENS
    is_within = np.arange(passages.shape[1]) <= (known - PASSAGE_TOKENS)[:, None]
    is_long = known > PASSAGE_TOKENS
    high = np.where(is_long, np.where(is_within, passages, -np.inf).max(axis=1), means)
    low = np.where(is_long, np.where(is_within, passages, np.inf).min(axis=1), means)
    return high.tolist(), low.tolist()


def _slots(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the slot of each pair of adjacent tokens, int64 [tokens - 1]."""
    return (_MULTIPLIER * ids[:-1] + ids[1:]) % NUM_SLOTS
