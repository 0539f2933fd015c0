"""How much of a completion the completions of other prompts share: what a policy says whatever it is asked.

A policy that pads, hedges or flatters comes to say the same to different prompts, in phrases that no list foresees.
Completions are compared with those of the latest prompts, by hashes of their phrases; memory is bounded, and a stream
that does not change gives figures that do not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.wording import PHRASE_BITS, PHRASE_KINDS, Statistic, Wording

_OF_PHRASES = "percent of the answer's phrases"

SHARED: tuple[Statistic, ...] = (
    Statistic("shared_phrases", _OF_PHRASES, scarce=5.0),
    Statistic("shared_openings", "percent of answers", scarce=100.0),
    Statistic("shared_endings", "percent of answers", scarce=100.0),
    Statistic("widely_shared_phrases", _OF_PHRASES, scarce=5.0),
    Statistic("widely_shared_openings", "percent of answers", scarce=100.0),
    Statistic("widely_shared_endings", "percent of answers", scarce=100.0),
    *(Statistic(f"widely_shared_phrases_{kind}", _OF_PHRASES, scarce=5.0) for kind in PHRASE_KINDS),
)
"""What `RecentPhrases` computes of each completion, in this order."""

NUM_PROMPTS = 255
"""Prompts whose completions are compared with; a byte counts them."""

WIDELY = 3
"""Other prompts whose completions have a widely shared phrase, at least."""

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

    def compare(self, completions: Sequence[Wording], prompts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Compare the completions of a batch with those of the prompts before it, then add them.

        Args:
            completions: those of a prompt are adjacent.
            prompts: number of the prompt of each, from 0, ascending.

        Returns:
            float64 [completions, `SHARED`]; NaN as long as there are too few prompts to compare with.
        """
        found = np.full((len(completions), len(SHARED)), np.nan)
        if self.is_full:
            found[:] = self._shared(completions)
        begins = np.flatnonzero(np.diff(prompts, prepend=-1))
        for begin, end in list(pairwise([*begins.tolist(), len(completions)]))[-NUM_PROMPTS:]:
            same = completions[begin:end]
            self._add(same[0].prompt, np.unique(np.concatenate([entry.phrases for entry in same])))
        return found

    def _shared(self, completions: Sequence[Wording]) -> NDArray[np.float64]:
        sizes = np.array([len(entry.phrases) for entry in completions])
        found = np.zeros((len(completions), len(SHARED)))
        has_any = sizes > 0
        if not has_any.any():
            return found
        counts = self._counts[np.concatenate([entry.phrases for entry in completions])]
        ends = np.cumsum(sizes)
        for entry, end in zip(completions, ends.tolist(), strict=True):
            own = self._of_prompt.get(entry.prompt, ())
            for earlier in own:  # an answer to the same prompt may well be similar
                counts[end - len(entry.phrases) : end] -= np.isin(entry.phrases, earlier)
        shared, widely = counts > 0, counts >= WIDELY
        kinds = np.concatenate([entry.kinds for entry in completions])[:, None]
        of_kind = np.unpackbits(kinds, axis=1, count=len(PHRASE_KINDS), bitorder="little") * widely[:, None]
        begins, last = (ends - sizes)[has_any], ends[has_any] - 1
        sums = np.add.reduceat(np.column_stack([shared, widely, of_kind]).astype(np.int64), begins, axis=0)
        shares = sums / sizes[has_any, None]
        found[has_any] = np.column_stack(
            [shares[:, 0], shared[begins], shared[last], shares[:, 1], widely[begins], widely[last], shares[:, 2:]]
        )
        return 100.0 * found

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
