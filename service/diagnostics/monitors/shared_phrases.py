"""How much of a completion the completions of other prompts share: what a policy says whatever it is asked.

A policy that pads, hedges or flatters comes to say the same to different prompts, in phrases that no list foresees. The
completions of a fixed number of prompts are compared with each other, by hashes of their phrases, so the figures of one
such batch depend on no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.phrasing import PHRASE_BITS, PHRASE_KINDS, Statistic, Wording

_OF_PHRASES = "percent of the answer's phrases"
_OF_ANSWERS = "percent of answers"

_PLAINLY_SHARED = (
    Statistic("shared_phrases", _OF_PHRASES, scarce=5.0),
    Statistic("shared_openings", _OF_ANSWERS, scarce=100.0),
    Statistic("shared_endings", _OF_ANSWERS, scarce=100.0),
    Statistic("widely_shared_phrases", _OF_PHRASES, scarce=5.0),
    Statistic("widely_shared_openings", _OF_ANSWERS, scarce=100.0),
    Statistic("widely_shared_endings", _OF_ANSWERS, scarce=100.0),
)
PLAINLY_SHARED = frozenset(statistic.name for statistic in _PLAINLY_SHARED)
"""Names of the statistics that do not say what the shared phrases are."""

SHARED: tuple[Statistic, ...] = (
    *_PLAINLY_SHARED,
    *(Statistic(f"widely_shared_phrases_{kind}", _OF_PHRASES, scarce=5.0) for kind in PHRASE_KINDS),
)
"""What `share_phrases` computes of each completion, in this order."""

NUM_PROMPTS = 128
"""Prompts whose completions are compared with each other, in the calibration and without another setting."""

WIDELY = 3
"""Other prompts whose completions have a widely shared phrase, at least."""

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class SharedPhrases:
    """The figures of `SHARED`."""

    values: Values
    """Of each completion, [completions, `SHARED`]."""

    lent: Values
    """What the completions of the others would lose without those of a prompt, summed over them, [prompts, `SHARED`].
    It is part of a prompt's influence on the mean, hence of the mean's standard error (the jackknife)."""


def share_phrases(completions: Sequence[Wording], prompts: NDArray[np.int64]) -> SharedPhrases:
    """Compare the completions of some prompts with each other; those of one prompt are not compared.

    Args:
        completions: of all prompts.
        prompts: number of the prompt of each, from 0, int64 [completions].
    """
    num_prompts = int(prompts.max(initial=-1)) + 1
    sizes = np.array([len(entry.phrases) for entry in completions], np.int64)
    if not sizes.sum():
        return SharedPhrases(np.zeros((len(completions), len(SHARED))), np.zeros((num_prompts, len(SHARED))))
    item = np.repeat(np.arange(len(completions)), sizes)
    phrases = np.concatenate([entry.phrases for entry in completions]).astype(np.int64)
    pairs, pair = np.unique(prompts[item] << PHRASE_BITS | phrases, return_inverse=True)
    _, phrase, holders = np.unique(pairs & (1 << PHRASE_BITS) - 1, return_inverse=True, return_counts=True)
    shared = np.flatnonzero(holders[phrase[pair]] > 1)  # the few that matter
    item, pair = item[shared], pair[shared]
    amounts = _amounts(completions, sizes, shared, item)
    own = _summed(pair, amounts, len(pairs))  # what a prompt's completions have of a phrase
    others = _summed(phrase, own, len(holders))[phrase] - own
    values, lent = [], []
    for needed, columns in ((1, slice(0, 3)), (WIDELY, slice(None))):
        has_others = np.flatnonzero(holders[phrase[pair]] > needed)
        values.append(_summed(item[has_others], amounts[has_others, columns], len(completions)))
        decisive = np.flatnonzero(holders[phrase] == needed + 1)
        lent.append(_summed(pairs[decisive] >> PHRASE_BITS, others[decisive, columns], num_prompts))
    return SharedPhrases(np.concatenate(values, axis=1), np.concatenate(lent, axis=1))


def _amounts(
    completions: Sequence[Wording], sizes: NDArray[np.int64], chosen: NDArray[np.int64], item: NDArray[np.int64]
) -> Values:
    """Return what each chosen phrase adds to the figures of its completion if it is shared, [chosen, 3 + kinds]."""
    share = 100.0 / sizes[item]
    ends = np.cumsum(sizes)
    opening, ending = (100.0 * (chosen == place[item]) for place in (ends - sizes, ends - 1))
    kinds = np.concatenate([entry.kinds for entry in completions])[chosen, None]
    of_kind = np.unpackbits(kinds, axis=1, count=len(PHRASE_KINDS), bitorder="little")
    return np.column_stack([share, opening, ending, of_kind * share[:, None]])


def _summed(groups: NDArray[np.int64], amounts: Values, num_groups: int) -> Values:
    """Sum the rows of each group, [groups, columns]."""
    return np.stack([np.bincount(groups, column, num_groups) for column in amounts.T], axis=1)
