"""What the monitors observe of a scored item, and the same for many items as arrays.

A value that is unknown for an item (no calibration, prompt and completion not separable, a level without style) is NaN
and is skipped by every statistic; it never counts as zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.phrasing import Wording
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
"""reward: raw, by the service's own weights. log_tokens: ln(1 + completion tokens). headers to markdown: style markers
per 100 words; markdown is the sum of the first three. repeat4, prompt_overlap: fractions of the style block. surprise:
the combined -ln p. oe_surprise: -ln p of the detector that was trained on hacks. flag: 0 or 1."""

COLUMNS: tuple[Column, ...] = get_args(Column)

MAX_SURPRISE = 12.0
"""Limit of the surprise in means, above which one item would outweigh a whole batch."""

MAX_OUTPUTS = 32
"""Outputs of a model that are monitored, the first ones; each adds readings and metrics."""

_UNKNOWN = math.nan


@dataclass(frozen=True, slots=True)
class Observation:
    """One scored item."""

    score: Score

    prompt: int
    """Number of the prompt: equal for the completions of one prompt within a request, different for all others."""

    num_completion_tokens: int | None = None

    truncated: bool = False
    """Whether the model read only a part of the item."""

    wording: Wording | None = field(default=None, repr=False, compare=False)
    """How the completion is worded; None where it is unknown."""

    values: tuple[float, ...] = field(init=False, repr=False, compare=False)
    """In the order of `COLUMNS`; computed once, because several windows read them."""

    def __post_init__(self) -> None:
        """Compute the values from the Score."""
        score, tokens = self.score, self.num_completion_tokens
        log_tokens = _UNKNOWN if tokens is None else math.log1p(tokens)
        object.__setattr__(
            self, "values", (_reward(score), log_tokens, *_style_rates(score.style), *_surprises(score.ood))
        )


@dataclass(frozen=True, slots=True, eq=False)
class ObservedItems:
    """Observations as arrays."""

    values: NDArray[np.float64]
    """[n, columns], NaN where unknown."""

    prompts: NDArray[np.int64]
    """Prompt numbers [n]."""

    truncated: NDArray[np.bool_]
    """[n]"""

    outputs: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 0)))
    """[n, outputs] of a model with several outputs; [n, 0] of one with one."""

    @classmethod
    def of(cls, observations: Sequence[Observation]) -> ObservedItems:
        """Return the observations, in order."""
        return cls(
            np.array([seen.values for seen in observations], np.float64).reshape(-1, len(COLUMNS)),
            np.array([seen.prompt for seen in observations], np.int64),
            np.array([seen.truncated for seen in observations], np.bool_),
            _outputs_of([seen.score for seen in observations]),
        )

    def columns(self, *names: Column) -> NDArray[np.float64]:
        """Return some columns [n, names], unknown values included."""
        return self.values[:, [COLUMNS.index(name) for name in names]]

    def known(self, *names: Column) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return the rows [m, names] in which all these are known, and their prompt numbers [m]."""
        rows = self.columns(*names)
        is_known = ~np.isnan(rows).any(axis=1)
        return rows[is_known], self.prompts[is_known]


def _reward(score: Score) -> float:
    """The reward; unknown also where weights of the request made it, because it is then on a scale of its own."""
    return _UNKNOWN if score.reward is None or score.own_weights else score.reward


def _outputs_of(scores: Sequence[Score]) -> NDArray[np.float64]:
    """Return the outputs [n, outputs], NaN for a score without them."""
    size = min(max((len(score.outputs) for score in scores), default=0), MAX_OUTPUTS)
    if not size:
        return np.empty((len(scores), 0))
    rows = np.full((len(scores), size), _UNKNOWN)
    for row, score in zip(rows, scores, strict=True):
        if score.outputs:
            row[:] = score.outputs[:size]
    return rows


def _style_rates(style: StyleReport | None) -> tuple[float, ...]:
    """Return markers per 100 words (headers, lists, bold, emoji, hedges, flattery, markdown), then the fractions."""
    if style is None:
        return (_UNKNOWN,) * 9
    per_word = 100.0 / max(1, style.words)
    headers, list_items, bold = style.headers * per_word, style.list_items * per_word, style.bold * per_word
    others = style.emoji * per_word, style.hedges * per_word, style.flattery * per_word
    fractions = _known(style.repeat4), _known(style.prompt_overlap)
    return headers, list_items, bold, *others, headers + list_items + bold, *fractions


def _surprises(ood: OodReport | None) -> tuple[float, float, float]:
    """Return the combined -ln p, -ln p of the detector that was trained on hacks, and the flag."""
    if ood is None:
        return _UNKNOWN, _UNKNOWN, _UNKNOWN
    from_trees = _UNKNOWN if ood.p_oe is None else -math.log(ood.p_oe)
    return min(ood.surprise, MAX_SURPRISE), from_trees, float(ood.flag)


def _known(value: float | None) -> float:
    return _UNKNOWN if value is None else value
