"""Tests a calibration on data that it was not made from, through the code that serves it.

Clean rows give the realised false-alarm rate and the length correlations, rows with a category give a table of what is
detected and what is not. The figures in the documentation are measured by this module.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.calibration.data import CleanItem, prompt_numbers
from export.calibration.measure import detection, length_correlations, rate_of
from export.calibration.pair_uncertainty import PairReport, measure_pairs
from export.calibration.paired_items import preference_pairs
from service.assembly import ServedModel
from service.console import Advance
from service.diagnostics.calibration_facts import LengthCorrelations, Rate
from service.diagnostics.item_state import ItemState
from service.diagnostics.ood import MIN_GROUP
from service.offline import encode_items, score_offline
from service.records import Encoding, Item, Score, TokenSequence

IN_DISTRIBUTION = "in_distribution"


@dataclass(frozen=True, slots=True)
class TestedItem:
    """A row of test data with its Scores."""

    __test__ = False

    row: CleanItem
    sequence: TokenSequence

    raw: Score
    """The Score before `Diagnostician.complete`."""

    score: Score
    """Score in a request with this item only."""

    score_with_siblings: Score | None = None
    """Score in a request with all plausible completions of its prompt; None for fewer than `MIN_GROUP`."""


@dataclass(frozen=True, slots=True)
class CategoryResult:
    """How well one category is detected."""

    is_ood: bool
    num_items: int
    auroc: float

    flagged: float
    """Share of flagged items."""

    reward_z: float
    """Mean of the standardised reward."""

    sibling_auroc: float | None
    """AUROC with siblings; None where no item has enough of them."""

    sibling_flagged: float | None


@dataclass(frozen=True, slots=True)
class TestReport:
    """Everything measured on test data; JSON-ready by ``asdict``."""

    __test__ = False

    rates: list[Rate]
    """Realised false-alarm rates of clean items, each in a separate request."""

    sibling_rates: list[Rate]
    """The same with siblings."""

    length: dict[str, LengthCorrelations]
    """Correlations with length of the ``raw`` and the ``adjusted`` reward."""

    categories: dict[str, CategoryResult]

    num_left_out: int
    """Rows that the service refuses."""

    pairs: PairReport | None
    """Whether uncertainty predicts wrong pairs; None for data without enough preference pairs."""

    def mean_auroc(self, *, siblings: bool = False) -> float | None:
        """Return the mean over the categories that are out of distribution; None without any."""
        found = [one.sibling_auroc if siblings else one.auroc for one in self.categories.values() if one.is_ood]
        known = [value for value in found if value is not None]
        return float(np.mean(known)) if known else None


def test_items(served: ServedModel, rows: Sequence[CleanItem], advance: Advance) -> tuple[list[TestedItem], int]:
    """Score rows at level ``full``, each alone; return them, and how many the service refuses."""
    items = [Item(row.exchange) for row in rows]
    encoded = list(encode_items(served.tokenization, items, Encoding()))
    diagnostician = served.scorer.pipeline.diagnostician
    raw = dict(
        score_offline(
            served.scorer.pipeline,
            encoded,
            level="full",
            max_batch_sequences=served.settings.batching.max_batch_sequences,
            advance=advance,
        )
    )
    tested = []
    for index, (row, item, sequence) in enumerate(zip(rows, items, encoded, strict=True)):
        outcome = raw[index]
        (score,) = diagnostician.diagnose([ItemState(item, sequence, outcome=outcome)], "full")
        if isinstance(sequence, TokenSequence) and isinstance(outcome, Score) and isinstance(score, Score):
            tested.append(TestedItem(row, sequence, outcome, score))
    return tested, len(rows) - len(tested)


def report(served: ServedModel, tested: Sequence[TestedItem], num_left_out: int) -> TestReport:
    """Evaluate scored test rows. Rows without a category, or of ``in_distribution``, are clean."""
    compared = _with_siblings(served, tested)
    clean = [one for one in compared if not one.row.is_ood and one.row.category in ("", IN_DISTRIBUTION)]
    by_category: defaultdict[str, list[TestedItem]] = defaultdict(list)
    for one in compared:
        if one.row.category and one.row.category != IN_DISTRIBUTION:
            by_category[one.row.category].append(one)
    return TestReport(
        rates=_rates(clean, [one.score for one in clean]),
        sibling_rates=_rates(
            [one for one in clean if one.score_with_siblings is not None], _scores_with_siblings(clean)
        ),
        length=_length(clean),
        categories={category: _category(clean, members) for category, members in sorted(by_category.items())},
        num_left_out=num_left_out,
        pairs=_pairs(clean),
    )


def _category(clean: Sequence[TestedItem], members: Sequence[TestedItem]) -> CategoryResult:
    clean_scores_with_siblings, with_siblings = _scores_with_siblings(clean), _scores_with_siblings(members)
    has_siblings = bool(with_siblings and clean_scores_with_siblings)
    alone = [one.score for one in members]
    return CategoryResult(
        is_ood=members[0].row.is_ood,
        num_items=len(members),
        auroc=detection(_surprises(one.score for one in clean), _surprises(alone)).auroc,
        flagged=_flagged(alone),
        reward_z=float(np.mean([score.reward_z for score in alone if score.reward_z is not None])),
        sibling_auroc=detection(_surprises(clean_scores_with_siblings), _surprises(with_siblings)).auroc
        if has_siblings
        else None,
        sibling_flagged=_flagged(with_siblings) if has_siblings else None,
    )


def _with_siblings(served: ServedModel, tested: Sequence[TestedItem]) -> list[TestedItem]:
    """Score each item once more in a request with all plausible completions of its prompt that the data has."""
    plausible: defaultdict[Any, list[TestedItem]] = defaultdict(list)
    for one in tested:
        if not one.row.is_ood and one.row.exchange.completion not in {
            other.row.exchange.completion for other in plausible[one.row.exchange.prompt]
        }:
            plausible[one.row.exchange.prompt].append(one)
    return [
        replace(one, score_with_siblings=_score_with_siblings(served, one, plausible[one.row.exchange.prompt]))
        for one in tested
    ]


def _score_with_siblings(served: ServedModel, one: TestedItem, plausible: Sequence[TestedItem]) -> Score | None:
    completion = one.row.exchange.completion
    group = [one, *(other for other in plausible if other.row.exchange.completion != completion)]
    if len(group) < MIN_GROUP:
        return None
    items = [ItemState(Item(member.row.exchange), member.sequence, outcome=member.raw) for member in group]
    scored = served.scorer.pipeline.diagnostician.diagnose(items, "full")[0]
    is_compared = isinstance(scored, Score) and scored.ood is not None and scored.ood.mode == "group"
    return scored if isinstance(scored, Score) and is_compared else None


def _scores_with_siblings(items: Sequence[TestedItem]) -> list[Score]:
    return [one.score_with_siblings for one in items if one.score_with_siblings is not None]


def _rates(clean: Sequence[TestedItem], scores: Sequence[Score]) -> list[Rate]:
    if not clean:
        return []
    prompts = np.array(prompt_numbers([one.row.exchange for one in clean]), np.int64)
    p_values = np.array([score.ood.p_value for score in scores if score.ood is not None])
    return [rate_of(p_values <= nominal, prompts, nominal) for nominal in (0.01, 0.05)]


def _length(clean: Sequence[TestedItem]) -> dict[str, LengthCorrelations]:
    if not clean:
        return {}
    prompts = np.array(prompt_numbers([one.row.exchange for one in clean]), np.int64)
    lengths = np.log1p([one.sequence.num_completion_tokens or 0 for one in clean])
    raw = np.array([one.score.reward for one in clean])
    adjusted = np.array([one.score.reward_length_adjusted for one in clean], np.float64)
    return {
        "raw": length_correlations(raw, lengths, prompts),
        "adjusted": length_correlations(adjusted, lengths, prompts),
    }


def _pairs(clean: Sequence[TestedItem]) -> PairReport | None:
    prompts = np.array(prompt_numbers([one.row.exchange for one in clean]), np.int64)
    return measure_pairs([one.score for one in clean], preference_pairs([one.row for one in clean]), prompts)


def _surprises(scores: Iterable[Score]) -> NDArray[np.float64]:
    return np.array([score.ood.surprise for score in scores if score.ood is not None])


def _flagged(scores: Iterable[Score]) -> float:
    return float(np.mean([score.ood.flag for score in scores if score.ood is not None]))
