"""Tests a calibration on data that it has never seen, through the code that serves it, and prints what was found.

Clean rows give the realised false-alarm rate and the length correlations, rows with a category the table of what is
seen and what is not. Every figure that the documentation quotes comes from here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from export.calibration.data import CleanItem, prompt_numbers
from export.calibration.measure import Rate, detection, length_test, rate_of
from service.assembly import ServedModel
from service.console import Advance
from service.diagnostics.ood import MIN_GROUP
from service.offline import encode_items, score_offline
from service.records import Encoding, Item, Score, TokenSequence

IN_DISTRIBUTION = "in_distribution"


@dataclass(frozen=True, slots=True)
class TestedItem:
    """A row of test data with the Score that the service gives it alone, before siblings are known."""

    __test__ = False

    row: CleanItem
    sequence: TokenSequence
    raw: Score
    score: Score


@dataclass(frozen=True, slots=True)
class CategoryResult:
    """What became of one category: alone, and (None where too few siblings are known) beside its siblings."""

    is_ood: bool
    num_items: int
    auroc: float
    flagged: float
    reward_z: float
    sibling_auroc: float | None
    sibling_flagged: float | None


@dataclass(frozen=True, slots=True)
class TestReport:
    """Everything measured on test data; JSON-ready by ``asdict``."""

    __test__ = False

    rates: list[Rate]
    sibling_rates: list[Rate]
    length: dict[str, dict[str, float]]
    categories: dict[str, CategoryResult]
    num_left_out: int

    def mean_auroc(self, *, siblings: bool = False) -> float | None:
        """Mean over the categories that are out of distribution."""
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
        texts = diagnostician.read_texts([item], [sequence], "full")
        (score,) = diagnostician.complete([item], [sequence], [outcome], texts, "full")
        if isinstance(sequence, TokenSequence) and isinstance(outcome, Score) and isinstance(score, Score):
            tested.append(TestedItem(row, sequence, outcome, score))
    return tested, len(rows) - len(tested)


def report(served: ServedModel, tested: Sequence[TestedItem], num_left_out: int) -> TestReport:
    """Measure on scored test rows. Rows without a category, or of ``in_distribution``, are clean."""
    clean = [one for one in tested if not one.row.is_ood and one.row.category in ("", IN_DISTRIBUTION)]
    beside = _beside_siblings(served, tested)
    clean_alone = _surprises(one.score for one in clean)
    clean_beside = {id(one): beside[id(one)] for one in clean if id(one) in beside}
    categories = {}
    by_category: defaultdict[str, list[TestedItem]] = defaultdict(list)
    for one in tested:
        if one.row.category and one.row.category != IN_DISTRIBUTION:
            by_category[one.row.category].append(one)
    for category, members in sorted(by_category.items()):
        grouped = [beside[id(one)] for one in members if id(one) in beside]
        has_siblings = bool(grouped and clean_beside)
        categories[category] = CategoryResult(
            is_ood=members[0].row.is_ood,
            num_items=len(members),
            auroc=detection(clean_alone, _surprises(one.score for one in members)).auroc,
            flagged=_flagged(one.score for one in members),
            reward_z=float(np.mean([one.score.reward_z for one in members])),
            sibling_auroc=(
                detection(_surprises(clean_beside.values()), _surprises(grouped)).auroc if has_siblings else None
            ),
            sibling_flagged=_flagged(grouped) if has_siblings else None,
        )
    return TestReport(
        rates=_rates(clean, {id(one): one.score for one in clean}),
        sibling_rates=_rates([one for one in clean if id(one) in clean_beside], clean_beside),
        length=_length(clean),
        categories=categories,
        num_left_out=num_left_out,
    )


def _beside_siblings(served: ServedModel, tested: Sequence[TestedItem]) -> dict[int, Score]:
    """Score each item once more beside all plausible completions of its prompt that the data has."""
    diagnostician = served.scorer.pipeline.diagnostician
    plausible: defaultdict[Any, list[TestedItem]] = defaultdict(list)
    for one in tested:
        if not one.row.is_ood and one.row.exchange.completion not in {
            other.row.exchange.completion for other in plausible[one.row.exchange.prompt]
        }:
            plausible[one.row.exchange.prompt].append(one)
    found = {}
    for one in tested:
        others = [
            other
            for other in plausible[one.row.exchange.prompt]
            if other.row.exchange.completion != one.row.exchange.completion
        ]
        if len(others) + 1 < MIN_GROUP:
            continue
        group = [one, *others]
        items = [Item(member.row.exchange) for member in group]
        sequences = [member.sequence for member in group]
        texts = diagnostician.read_texts(items, sequences, "full")
        scored = diagnostician.complete(items, sequences, [member.raw for member in group], texts, "full")[0]
        if isinstance(scored, Score) and scored.ood is not None and scored.ood.mode == "group":
            found[id(one)] = scored
    return found


def _rates(clean: Sequence[TestedItem], scores: Mapping[int, Score]) -> list[Rate]:
    if not clean:
        return []
    prompts = np.array(prompt_numbers([one.row.exchange for one in clean]), np.int64)
    p_values = np.array([ood.p_value for one in clean if (ood := scores[id(one)].ood) is not None])
    return [rate_of(p_values <= nominal, prompts, nominal) for nominal in (0.01, 0.05)]


def _length(clean: Sequence[TestedItem]) -> dict[str, dict[str, float]]:
    if not clean:
        return {}
    prompts = np.array(prompt_numbers([one.row.exchange for one in clean]), np.int64)
    lengths = np.log1p([one.sequence.num_completion_tokens or 0 for one in clean])
    raw = np.array([one.score.reward for one in clean])
    adjusted = np.array([one.score.reward_length_adjusted for one in clean], np.float64)
    return {
        "raw": asdict(length_test(raw, lengths, prompts)),
        "adjusted": asdict(length_test(adjusted, lengths, prompts)),
    }


def _surprises(scores: Any) -> NDArray[np.float64]:
    return np.array([score.ood.surprise for score in scores if score.ood is not None])


def _flagged(scores: Any) -> float:
    return float(np.mean([score.ood.flag for score in scores if score.ood is not None]))


def print_facts(console: Console, facts: Mapping[str, Any]) -> None:
    """Print what a calibration says of itself."""
    console.print(
        f"{facts['num_fit']} items to fit, {facts['num_combine']} to choose by, {facts['num_conformal']} for p-values "
        f"(of {facts['num_prompts']} prompts). Admitted: {', '.join(facts['admitted'])}."
    )
    for rate in facts["self_test"]["rates"]:
        console.print(_rate_line("Out of fold", rate), highlight=False)
    for name, found in facts["length"].items():
        console.print(
            f"Correlation of the {name} reward with log length: {found['pooled']:+.3f} pooled, "
            f"{found['within']:+.3f} within prompts",
            highlight=False,
        )
    console.print(_suite_table(facts["suite"], facts["realised"], facts["unseen_family"]))


def print_report(console: Console, found: TestReport) -> None:
    """Print what was found on test data."""
    for rate in found.rates:
        console.print(_rate_line("Unseen, alone", asdict(rate)), highlight=False)
    for rate in found.sibling_rates:
        console.print(_rate_line("Unseen, beside siblings", asdict(rate)), highlight=False)
    for name, correlations in found.length.items():
        console.print(
            f"Unseen: correlation of the {name} reward with log length {correlations['pooled']:+.3f} pooled, "
            f"{correlations['within']:+.3f} within prompts",
            highlight=False,
        )
    if not found.categories:
        return
    table = Table("category", "items", "reward z", "AUROC", "flagged", "AUROC, siblings", "flagged, siblings")
    for name, one in found.categories.items():
        table.add_row(
            name if one.is_ood else f"({name})",
            str(one.num_items),
            f"{one.reward_z:+.2f}",
            f"{one.auroc:.3f}",
            f"{one.flagged:.2f}",
            "-" if one.sibling_auroc is None else f"{one.sibling_auroc:.3f}",
            "-" if one.sibling_flagged is None else f"{one.sibling_flagged:.2f}",
        )
    console.print(table)
    alone, beside = found.mean_auroc(), found.mean_auroc(siblings=True)
    console.print(
        f"Mean AUROC over the categories that are out of distribution: {alone:.3f}"
        + ("" if beside is None else f", beside siblings {beside:.3f}")
        + f". In brackets: plausible texts. Left out, since the service refuses them: {found.num_left_out}."
        if alone is not None
        else "No category is out of distribution.",
        highlight=False,
    )


def _rate_line(what: str, rate: Mapping[str, Any]) -> str:
    return (
        f"{what}: p <= {rate['nominal']:.2f} for {rate['value']:.2%} ± {rate['standard_error']:.2%} of "
        f"{rate['num_items']} clean items ({rate['num_prompts']} prompts)"
    )


def _suite_table(
    suite: Mapping[str, Mapping[str, Any]], realised: Mapping[str, Any], unseen: Mapping[str, Any]
) -> Table:
    """AUROC of the combination, its share found at 1 percent false alarms, and the AUROC of every component alone."""
    components = [name for name in suite if name != "combined"]
    table = Table("built-in set", "AUROC", "TPR@1%", *components, "oe, unseen family")
    for kind, combined in suite["combined"].items():
        alone = (f"{suite[name][kind]['auroc']:.3f}" for name in components)
        novel = f"{unseen[kind]['auroc']:.3f}" if kind in unseen else "-"
        table.add_row(kind, f"{combined['auroc']:.3f}", f"{combined['tpr1']:.2f}", *alone, novel)
    table.add_section()
    means = (f"{np.mean([one['auroc'] for one in suite[name].values()]):.3f}" for name in components)
    mean = [np.mean([one[figure] for one in suite["combined"].values()]) for figure in ("auroc", "tpr1")]
    table.add_row("mean", f"{mean[0]:.3f}", f"{mean[1]:.2f}", *means, "")
    rates = (f"{realised[name]['value']:.2%}" for name in components)
    table.add_row("false alarms at 1 %", f"{realised['combined']['value']:.2%}", "", *rates, "")
    return table
