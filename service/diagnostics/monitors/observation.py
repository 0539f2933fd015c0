"""What the monitors take in of a scored item, and the same for many items as arrays.

What is unknown about an item (no calibration, no border between prompt and completion, a level without style) is NaN
here and is skipped by every statistic; it is never counted as zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from service.records import OodReport, Score, StyleReport

Column: TypeAlias = Literal[
    "reward",
    "log_tokens",
    "headers",
    "list_items",
    "bold",
    "emoji",
    "hedges",
    "flattery",
    "markdown",
    "repeat4",
    "prompt_overlap",
    "surprise",
    "oe_surprise",
    "flag",
]
"""reward: raw. log_tokens: ln(1 + completion tokens). headers to markdown: tells per 100 words, markdown the sum of the
first three. repeat4, prompt_overlap: fractions of the style block. surprise: the combined -ln p. oe_surprise: -ln p of
the detector that was shown hacks. flag: 0 or 1."""

COLUMNS: tuple[Column, ...] = (
    "reward",
    "log_tokens",
    "headers",
    "list_items",
    "bold",
    "emoji",
    "hedges",
    "flattery",
    "markdown",
    "repeat4",
    "prompt_overlap",
    "surprise",
    "oe_surprise",
    "flag",
)
MAX_SURPRISE = 12.0
"""Beyond it one item would outweigh a whole batch."""
_UNKNOWN = math.nan


@dataclass(frozen=True, slots=True)
class Observation:
    """One scored item.

    ``prompt``: a number that the completions of one prompt have in common within their request, and nobody else has.
    ``values``: what is known, in the order of `COLUMNS`; read once, as several windows ask for it.
    """

    score: Score
    prompt: int
    num_completion_tokens: int | None = None
    truncated: bool = False
    values: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Read the values off the Score."""
        score, tokens = self.score, self.num_completion_tokens
        log_tokens = _UNKNOWN if tokens is None else math.log1p(tokens)
        object.__setattr__(self, "values", (score.reward, log_tokens, *_tells(score.style), *_surprises(score.ood)))


@dataclass(frozen=True, slots=True, eq=False)
class ObservedItems:
    """Observations as arrays: values [n, columns] with NaN where unknown, prompt numbers [n], truncated [n]."""

    values: NDArray[np.float64]
    prompts: NDArray[np.int64]
    truncated: NDArray[np.bool_]

    @classmethod
    def of(cls, observations: Sequence[Observation]) -> ObservedItems:
        """Return the observations, in order."""
        return cls(
            np.array([seen.values for seen in observations], np.float64).reshape(-1, len(COLUMNS)),
            np.array([seen.prompt for seen in observations], np.int64),
            np.array([seen.truncated for seen in observations], np.bool_),
        )

    def columns(self, *names: Column) -> NDArray[np.float64]:
        """Return some columns [n, names], unknown values included."""
        return self.values[:, [COLUMNS.index(name) for name in names]]

    def known(self, *names: Column) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return the rows [m, names] of which all these are known, and the prompt numbers [m] that go with them."""
        rows = self.columns(*names)
        is_known = ~np.isnan(rows).any(axis=1)
        return rows[is_known], self.prompts[is_known]


def _tells(style: StyleReport | None) -> tuple[float, ...]:
    """Tells per 100 words: headers, lists, bold spans, emoji, hedges, flattery, the first three; then fractions."""
    if style is None:
        return (_UNKNOWN,) * 9
    per_word = 100.0 / max(1, style.words)
    headers, list_items, bold = style.headers * per_word, style.list_items * per_word, style.bold * per_word
    others = style.emoji * per_word, style.hedges * per_word, style.flattery * per_word
    fractions = _known(style.repeat4), _known(style.prompt_overlap)
    return headers, list_items, bold, *others, headers + list_items + bold, *fractions


def _surprises(ood: OodReport | None) -> tuple[float, float, float]:
    """Combined -ln p, that of the detector that was shown hacks, and the flag."""
    if ood is None:
        return _UNKNOWN, _UNKNOWN, _UNKNOWN
    of_hacks = _UNKNOWN if ood.p_oe is None else -math.log(ood.p_oe)
    return min(ood.surprise, MAX_SURPRISE), of_hacks, float(ood.flag)


def _known(value: float | None) -> float:
    return _UNKNOWN if value is None else value
