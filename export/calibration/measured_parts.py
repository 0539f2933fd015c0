"""The statistics of all scored items, by part, and the state forms and n-gram counts that they are computed with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import cast

import numpy as np
from numpy.typing import NDArray

from export.calibration.data import Part, prompt_numbers
from export.calibration.fit import fit_laplace, fit_state_form
from export.calibration.hacks import SUITE
from export.calibration.head_resampling import LabelledPairs
from export.calibration.scored_parts import ScoredParts
from export.calibration.scoring import ScoredItems
from service.checkpoints.checkpoint import Checkpoint
from service.diagnostics.conformal import Scores
from service.diagnostics.detectors import Matrix
from service.diagnostics.ngrams import NgramCounts
from service.diagnostics.states import PER_TAP, StateReader
from service.diagnostics.text import STATISTICS, TextFacts, TextReader
from service.errors import CalibrationError
from service.records import StateTap

NUM_TEXT = len(STATISTICS)


@dataclass(frozen=True, slots=True)
class MeasuredItems:
    """Scored items with all their statistics."""

    scored: ScoredItems
    texts: Sequence[TextFacts] = field(repr=False)

    statistics: Matrix = field(repr=False)
    """Statistics of the text, then five for each tap, float64 [items, texts + 5 x taps]."""

    prompts: NDArray[np.int64] = field(repr=False)
    """Number of each item's prompt, from 0, [items]."""

    kinds: NDArray[np.str_] = field(repr=False)
    """Name of each hack's set, [items]; empty for clean items."""

    @property
    def log_lengths(self) -> Scores:
        """ln(1 + completion tokens) of each item."""
        counts = [sequence.num_completion_tokens or 0 for sequence in self.scored.sequences]
        return np.log1p(np.array(counts, np.float64))

    def of_kind(self, kind: str, columns: Matrix) -> Matrix:
        """Return the rows of a matrix (or scores) that belong to one set."""
        return np.asarray(columns[self.kinds == kind])


@dataclass(frozen=True, slots=True)
class MeasuredParts:
    """The measured parts, and what was fitted to the part ``fit_states`` on the way."""

    clean: Mapping[Part, MeasuredItems]
    hacks: Mapping[Part, MeasuredItems]
    ngrams: NgramCounts
    reader: StateReader

    pairs: LabelledPairs
    """Preference pairs of all parts."""

    @classmethod
    def measure(cls, scored: ScoredParts, taps: tuple[StateTap, ...], checkpoint: Checkpoint) -> MeasuredParts:
        """Fit state forms and n-gram counts to the part ``fit_states``, and compute the statistics of all parts.

        Args:
            scored: everything that was scored.
            taps: taps of the scored states.
            checkpoint: checkpoint of the model that the items were scored with.

        Raises:
            CalibrationError: a hidden state is not finite.
        """
        base = scored.clean["fit_states"]
        forms = [fit_state_form(base.states[:, tap]) for tap in range(len(taps))]
        head = len(taps) - 1
        prompts = np.array(prompt_numbers(base.exchanges), np.int64)
        laplace = fit_laplace(base.states[:, head], base.rewards, prompts, forms[head])
        reader = StateReader(taps, forms, laplace, head)
        ngrams = NgramCounts.of([sequence.token_ids for sequence in base.sequences], checkpoint.embedding_size)
        texts = TextReader(ngrams, frozenset(checkpoint.tokenizer.all_special_ids))
        return cls(
            clean={part: _measured(items, texts, reader) for part, items in scored.clean.items()},
            hacks={part: _measured(items, texts, reader, kinds) for part, (items, kinds) in scored.hacks.items()},
            ngrams=ngrams,
            reader=reader,
            pairs=_labelled_pairs(scored, head),
        )

    def kinds(self, *, trained_only: bool = True) -> list[str]:
        """Return the names of the sets of which every part has items, in the order of the suite."""
        made = set.intersection(*(set(hacks.kinds) for hacks in self.hacks.values()))
        return [entry.name for entry in SUITE if entry.name in made and (entry.trains or not trained_only)]

    def training_hacks(self, *, without: str | None = None) -> tuple[Matrix, Scores]:
        """Return the statistics and weights of the hacks that detectors may be trained on, except those of a family."""
        weights = {entry.name: entry.weight for entry in SUITE if entry.trains and entry.family != without}
        hacks = self.hacks["fit_detectors"]
        chosen = np.isin(hacks.kinds, list(weights))
        return hacks.statistics[chosen], np.array([weights[kind] for kind in hacks.kinds[chosen]])

    def with_taps(self, selected: Sequence[int]) -> MeasuredParts:
        """Return the same parts with some of the taps only; the head's tap must be among them."""
        reader = self.reader
        columns = [*range(NUM_TEXT), *chain.from_iterable(tap_columns(tap) for tap in selected)]

        def narrowed(parts: Mapping[Part, MeasuredItems]) -> dict[Part, MeasuredItems]:
            return {part: replace(items, statistics=items.statistics[:, columns]) for part, items in parts.items()}

        return replace(
            self,
            clean=narrowed(self.clean),
            hacks=narrowed(self.hacks),
            reader=StateReader(
                tuple(reader.taps[tap] for tap in selected),
                [reader.forms[tap] for tap in selected],
                reader.laplace,
                list(selected).index(reader.head_tap),
            ),
        )


def tap_columns(tap: int) -> range:
    """Return the columns of a tap's statistics."""
    return range(NUM_TEXT + tap * len(PER_TAP), NUM_TEXT + (tap + 1) * len(PER_TAP))


def joined(parts: Sequence[MeasuredItems]) -> tuple[Scores, Scores, NDArray[np.int64]]:
    """Return log lengths, rewards and prompt numbers of several parts, which have no prompt in common."""
    first = np.cumsum([0, *(items.prompts.max() + 1 for items in parts)])
    return (
        np.concatenate([items.log_lengths for items in parts]),
        np.concatenate([items.scored.rewards for items in parts]),
        np.concatenate([items.prompts + start for items, start in zip(parts, first, strict=False)]),
    )


def _labelled_pairs(scored: ScoredParts, head: int) -> LabelledPairs:
    """Return the preference pairs of all parts, which have no prompt in common."""
    differences, margins, prompts = [], [], []
    first = 0
    for part, items in scored.clean.items():
        chosen, rejected = scored.pairs[part].T
        numbers = np.array(prompt_numbers(items.exchanges), np.int64) + first
        differences.append(items.states[chosen, head] - items.states[rejected, head])
        margins.append(items.rewards[chosen] - items.rewards[rejected])
        prompts.append(numbers[chosen])
        first += len(items)
    return LabelledPairs(np.concatenate(differences), np.concatenate(margins), np.concatenate(prompts))


def _measured(items: ScoredItems, texts: TextReader, reader: StateReader, kinds: Sequence[str] = ()) -> MeasuredItems:
    facts = items.read_texts(texts)
    text_statistics = np.stack([cast("Scores", fact.statistics) for fact in facts])
    statistics = np.concatenate([text_statistics, reader.statistics(items.states)], axis=1)
    if not np.isfinite(statistics).all():
        raise CalibrationError("Some hidden states are not finite.")
    return MeasuredItems(
        items, facts, statistics, np.array(prompt_numbers(items.exchanges), np.int64), np.array(kinds, np.str_)
    )
