"""Preference pairs with the rewards of both completions: the input of every measure of the audit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from service.records import Completion, completion_text
from training.preferences import PreferencePair

FloatArray: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]
LengthUnit: TypeAlias = Literal["tokens", "characters"]


@dataclass(frozen=True, slots=True)
class OutputRewards:
    """One output of a model with several, for both completions of each pair [pair]."""

    chosen: FloatArray = field(repr=False)
    rejected: FloatArray = field(repr=False)


@dataclass(frozen=True, slots=True)
class ScoredPairs:
    """Pairs in file order, with arrays [pair]."""

    pairs: Sequence[PreferencePair] = field(repr=False)

    chosen: FloatArray = field(repr=False)
    """Raw rewards of the chosen completions."""

    rejected: FloatArray = field(repr=False)
    """Raw rewards of the rejected completions."""

    chosen_lengths: FloatArray = field(repr=False)
    """In ``unit``."""

    rejected_lengths: FloatArray = field(repr=False)
    """In ``unit``."""

    unit: LengthUnit = "tokens"

    failures: Mapping[str, int] = field(default_factory=dict)
    """Numbers of the pairs that were left out because a completion has no reward, by reason."""

    outputs: Mapping[str, OutputRewards] = field(default_factory=dict, repr=False)
    """Each output of a model with several, by name; empty for a model with one."""

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def num_failed(self) -> int:
        """Pairs that were left out because a completion has no reward."""
        return sum(self.failures.values())

    @property
    def num_ties(self) -> int:
        """Pairs of identical completions."""
        return sum(pair.chosen == pair.rejected for pair in self.pairs)

    @property
    def gaps(self) -> FloatArray:
        """Chosen minus rejected reward [pair]: all that the Bradley-Terry model depends on."""
        return self.chosen - self.rejected

    @property
    def length_gaps(self) -> FloatArray:
        """Length of the chosen minus that of the rejected completion [pair]."""
        return self.chosen_lengths - self.rejected_lengths

    @property
    def prompts(self) -> IntArray:
        """The number of each pair's prompt [pair], see ``number_distinct``."""
        return number_distinct(pair.prompt for pair in self.pairs)

    def select(self, mask: NDArray[np.bool_]) -> ScoredPairs:
        """Return the pairs for which ``mask`` [pair] is true."""
        return ScoredPairs(
            pairs=[pair for pair, is_selected in zip(self.pairs, mask, strict=True) if is_selected],
            chosen=self.chosen[mask],
            rejected=self.rejected[mask],
            chosen_lengths=self.chosen_lengths[mask],
            rejected_lengths=self.rejected_lengths[mask],
            unit=self.unit,
            outputs={
                name: OutputRewards(output.chosen[mask], output.rejected[mask]) for name, output in self.outputs.items()
            },
        )


@dataclass(frozen=True, slots=True)
class Completions:
    """Distinct completions, with arrays [completion]."""

    texts: Sequence[str] = field(repr=False)

    pairs: Sequence[PreferencePair] = field(repr=False)
    """The first pair that has the completion."""

    sides: Sequence[str]
    """"chosen", "rejected", or "both" where it was chosen in one pair and rejected in another."""

    rewards: FloatArray

    lengths: FloatArray
    """In the unit of the scored pairs."""

    prompts: IntArray
    """The number of the prompt."""

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def log_lengths(self) -> FloatArray:
        """ln(1 + length)."""
        return np.asarray(np.log1p(self.lengths))


def distinct_completions(scored: ScoredPairs) -> Completions:
    """Return the completions of the pairs, each once, in order of appearance."""
    found: dict[tuple[object, Completion], list[int]] = {}
    for number, pair in enumerate(scored.pairs):
        prompt = (pair.prompt, pair.tools)
        found.setdefault((prompt, pair.chosen), []).append(2 * number)
        found.setdefault((prompt, pair.rejected), []).append(2 * number + 1)
    occurrences = list(found.values())
    first = np.array([indices[0] for indices in occurrences], dtype=np.int64)
    pairs = [scored.pairs[index // 2] for index in first]
    rewards = np.stack([scored.chosen, scored.rejected], axis=1).ravel()
    lengths = np.stack([scored.chosen_lengths, scored.rejected_lengths], axis=1).ravel()
    return Completions(
        texts=[completion_text(completion) for _, completion in found],
        pairs=pairs,
        sides=[_side({index % 2 for index in indices}) for indices in occurrences],
        rewards=rewards[first],
        lengths=lengths[first],
        prompts=number_distinct((pair.prompt, pair.tools) for pair in pairs),
    )


def number_distinct(keys: Iterable[object]) -> IntArray:
    """Return a number for each key: equal keys, equal numbers, from 0 in order of appearance."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _side(parities: set[int]) -> str:
    return "both" if len(parities) > 1 else ("rejected" if 1 in parities else "chosen")
