"""How much of a completion the completions of other prompts share: what a policy says whatever it is asked.

A policy that pads, hedges or flatters comes to say the same to different prompts, in phrases that no list foresees.
Completions are compared with those of the latest prompts, by hashes of their phrases; memory is bounded, and a stream
that does not change gives figures that do not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.wording import PHRASE_BITS, PHRASE_KINDS, Statistic, Wording

_OF_PHRASES = "percent of the answer's phrases"

SHARED: tuple[Statistic, ...] = (
    Statistic("shared_phrases", _OF_PHRASES, scarce=5.0),
    Statistic("shared_openings", "percent of answers", scarce=100.0),
    Statistic("shared_endings", "percent of answers", scarce=100.0),
    *(Statistic(f"shared_phrases_{kind}", _OF_PHRASES, scarce=5.0) for kind in PHRASE_KINDS),
)
"""What `RecentPhrases` computes of each completion, in this order."""

NUM_PROMPTS = 255
"""Prompts whose completions are compared with; a byte counts them."""

Phrases = NDArray[np.uint32]


class RecentPhrases:
    """The phrases of the completions of the latest prompts."""

    def __init__(self) -> None:
        self._counts = np.zeros(1 << PHRASE_BITS, np.uint8)
        self._latest: deque[tuple[int, Phrases]] = deque()
        self._of_prompt: dict[int, list[Phrases]] = {}

    @property
    def is_full(self) -> bool:
        """Whether there are as many prompts as completions are compared with."""
        return len(self._latest) == NUM_PROMPTS

    def compare(self, completions: Sequence[Wording]) -> NDArray[np.float64]:
        """Compare the completions of one prompt with those of the others, then add them.

        Returns:
            float64 [completions, `SHARED`]; NaN as long as there are too few prompts to compare with.
        """
        found = np.full((len(completions), len(SHARED)), np.nan)
        if self.is_full:
            own = self._of_prompt.get(completions[0].prompt, ())
            for row, completion in zip(found, completions, strict=True):
                row[:] = self._shared(completion, own)
        self._add(completions[0].prompt, np.unique(np.concatenate([entry.phrases for entry in completions])))
        return found

    def _shared(self, completion: Wording, own: Iterable[Phrases]) -> NDArray[np.float64]:
        phrases = completion.phrases
        if not len(phrases):
            return np.zeros(len(SHARED))
        counts = self._counts[phrases].astype(np.int64)
        for earlier in own:  # an answer to the same prompt may well be similar
            counts -= np.isin(phrases, earlier)
        shared = counts > 0
        of_kind = np.unpackbits(completion.kinds[shared, None], axis=1, count=len(PHRASE_KINDS), bitorder="little")
        found = np.array([shared.sum(), shared[0] * len(phrases), shared[-1] * len(phrases), *of_kind.sum(axis=0)])
        return np.asarray(100.0 * found / len(phrases))

    def _add(self, prompt: int, phrases: Phrases) -> None:
        if self.is_full:
            oldest, dropped = self._latest.popleft()
            self._counts[dropped] -= 1
            others = self._of_prompt[oldest]
            others.pop(0)
            if not others:
                del self._of_prompt[oldest]
        self._latest.append((prompt, phrases))
        self._of_prompt.setdefault(prompt, []).append(phrases)
        self._counts[phrases] += 1
