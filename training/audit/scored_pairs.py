"""Preference pairs with the rewards of both completions: the record that every measure of the audit reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from training.preferences import PreferencePair

FloatArray: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]
LengthUnit: TypeAlias = Literal["tokens", "characters"]


@dataclass(frozen=True, slots=True)
class ScoredPairs:
    """Pairs in file order, and beside them arrays [pair].

    ``chosen``, ``rejected``: raw rewards. ``chosen_lengths``, ``rejected_lengths``: of the completions, in ``unit``.
    ``num_failed``: pairs that were left out because a completion has no reward.
    """

    pairs: Sequence[PreferencePair] = field(repr=False)
    chosen: FloatArray = field(repr=False)
    rejected: FloatArray = field(repr=False)
    chosen_lengths: FloatArray = field(repr=False)
    rejected_lengths: FloatArray = field(repr=False)
    unit: LengthUnit = "tokens"
    num_failed: int = 0

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def gaps(self) -> FloatArray:
        """Chosen less rejected reward; the only thing that the Bradley-Terry model gives a meaning to."""
        return self.chosen - self.rejected

    @property
    def length_gaps(self) -> FloatArray:
        """Length of the chosen completion less that of the rejected one."""
        return self.chosen_lengths - self.rejected_lengths

    @property
    def prompts(self) -> IntArray:
        """A number for each pair's prompt: equal prompts, equal numbers, from 0 in order of appearance."""
        return number_distinct(pair.prompt for pair in self.pairs)

    def select(self, kept: NDArray[np.bool_]) -> ScoredPairs:
        """Return the pairs at which ``kept`` [pair] is true."""
        return ScoredPairs(
            pairs=[pair for pair, keep in zip(self.pairs, kept, strict=True) if keep],
            chosen=self.chosen[kept],
            rejected=self.rejected[kept],
            chosen_lengths=self.chosen_lengths[kept],
            rejected_lengths=self.rejected_lengths[kept],
            unit=self.unit,
        )


@dataclass(frozen=True, slots=True)
class Completions:
    """Every completion once, also where several pairs hold it. Arrays [completion].

    ``sides``: "chosen", "rejected", or "both" where it won one pair and lost another.
    """

    texts: Sequence[str] = field(repr=False)
    pairs: Sequence[PreferencePair] = field(repr=False)
    sides: Sequence[str]
    rewards: FloatArray
    lengths: FloatArray
    prompts: IntArray

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def log_lengths(self) -> FloatArray:
        """ln(1 + length)."""
        return np.asarray(np.log1p(self.lengths))


def distinct_completions(scored: ScoredPairs) -> Completions:
    """Return the completions of the pairs, each once, in order of appearance."""
    found: dict[tuple[object, str], list[int]] = {}
    for place, pair in enumerate(scored.pairs):
        found.setdefault((pair.prompt, pair.chosen), []).append(2 * place)
        found.setdefault((pair.prompt, pair.rejected), []).append(2 * place + 1)
    places = list(found.values())
    first = np.array([rows[0] for rows in places], dtype=np.int64)
    pairs = [scored.pairs[place // 2] for place in first]
    rewards = np.stack([scored.chosen, scored.rejected], axis=1).ravel()
    lengths = np.stack([scored.chosen_lengths, scored.rejected_lengths], axis=1).ravel()
    return Completions(
        texts=[text for _, text in found],
        pairs=pairs,
        sides=[_side({row % 2 for row in rows}) for rows in places],
        rewards=rewards[first],
        lengths=lengths[first],
        prompts=number_distinct(pair.prompt for pair in pairs),
    )


def number_distinct(keys: Iterable[object]) -> IntArray:
    """Return a number for each key: equal keys, equal numbers, from 0 in order of appearance."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _side(parities: set[int]) -> str:
    return "both" if len(parities) > 1 else ("rejected" if 1 in parities else "chosen")
