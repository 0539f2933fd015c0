"""Makes a calibration: scores the parts of the data and the built-in hacks, fits, chooses, ranks, and tests itself.

Every choice (taps, the form of the feature component, which components are admitted) is made by what it gains on the
hacks of the combine part, on the user's own model; what is reported is measured on the conformal part, whose prompts
nothing was fitted to or chosen on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from export.calibration.data import CleanItem, Part, prompt_numbers, split
from export.calibration.fit import (
    fit_gaussian,
    fit_laplace,
    fit_length_curve,
    fit_siblings,
    fit_state_form,
    fit_trees,
    sibling_deviations,
)
from export.calibration.hacks import SUITE, Base, Hack, HackSet, make_hacks
from export.calibration.measure import Detection, detection, length_test, mean_over_sets, out_of_fold_p, self_test
from export.calibration.scoring import ScoredItems, score_items
from service.assembly import ServedModel, arithmetic_of
from service.diagnostics.calibration import Calibration
from service.diagnostics.conformal import Scores, TailMap
from service.diagnostics.detectors import Matrix, ShrunkGaussian, TestBank, TreeEnsemble
from service.diagnostics.lookup import binding_of
from service.diagnostics.monitors.observation import Observation, ObservedItems
from service.diagnostics.monitors.reference import MonitorReference, fit_reference
from service.diagnostics.ngrams import NgramCounts
from service.diagnostics.ood import COMPONENTS, MIN_GROUP, Component, Detectors, OodJudge, Ranking
from service.diagnostics.reference import Reference
from service.diagnostics.states import PER_TAP, StateReader
from service.diagnostics.text import STATISTICS, TextFacts, TextReader, style_report
from service.errors import CalibrationError
from service.records import Encoding, Score

STYLE = ("md", "emoji", "hedge", "flattery", "rep4", "zratio", "nonascii", "overlap")
NUM_TEXT = len(STATISTICS)
MIN_PART_ITEMS = 60
PSEUDO_GROUP = 6
"""Size of the groups that are put together where the data has no prompt with `MIN_GROUP` completions."""

MIN_GROUPED_ITEMS = 200
TAP_CHOICES = (1, 3)
"""How many taps beside the head's are tried, before all of them are."""

WORTHWHILE = 0.005
"""Gain of a component or of further taps from which it is taken."""

WEAK_AUROC = 0.70

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Base items of each built-in set: to learn from, to choose by, and to report on."""

    learn: int = 40
    choose: int = 20
    report: int = 40


@dataclass(frozen=True, slots=True)
class Measured:
    """Scored items of one kind with all their statistics. ``kinds``: the set of each hack; empty for clean items."""

    scored: ScoredItems
    texts: Sequence[TextFacts] = field(repr=False)
    statistics: Matrix = field(repr=False)
    prompts: NDArray[np.int64] = field(repr=False)
    kinds: NDArray[np.str_] = field(repr=False)

    def of_kind(self, kind: str, columns: Matrix) -> Matrix:
        """Return the rows of a matrix (or scores) that belong to one set."""
        return np.asarray(columns[self.kinds == kind])


@dataclass(frozen=True, slots=True)
class Scored:
    """Everything that was scored: clean items by part, and hacks by the part whose prompts they were made of."""

    clean: Mapping[Part, ScoredItems]
    hacks: Mapping[Part, tuple[ScoredItems, list[str]]]


def count_items(items: Sequence[CleanItem], sizes: Sizes, sets: Sequence[HackSet] = SUITE) -> int:
    """Return how many items a calibration will score, for its progress bar."""
    return len(items) + len(sets) * (sizes.learn + sizes.choose + sizes.report)


def score_all(
    served: ServedModel,
    items: Sequence[CleanItem],
    sizes: Sizes,
    advance: Advance,
    *,
    seed: int,
    sets: Sequence[HackSet] = SUITE,
    cache: Path | None = None,
) -> Scored:
    """Score the parts of the data, and the hacks made of three of them.

    Raises:
        CalibrationError: a part is too small, or the model gives no finite reward or no states.
    """
    parts = split(items)
    for part, members in parts.items():
        if len(members) < MIN_PART_ITEMS:
            raise CalibrationError(
                f"Part {part} has {len(members)} items; it needs {MIN_PART_ITEMS}: bring more prompts."
            )
    clean = {}
    for part, members in parts.items():
        clean[part] = score_items(served, [item.exchange for item in members], advance, cache)[0]
    hacks: dict[Part, tuple[ScoredItems, list[str]]] = {}
    counts: tuple[tuple[Part, int], ...] = (
        ("detectors", sizes.learn), ("combine", sizes.choose), ("conformal", sizes.report)
    )  # fmt: skip
    for part, num_bases in counts:
        made = _hacks_of(served, clean, part, num_bases, sets, seed)
        scored, places = score_items(served, [hack.exchange for hack in made], advance, cache)
        hacks[part] = scored, [made[place].kind for place in places]
    return Scored(clean, hacks)


def _hacks_of(
    served: ServedModel,
    clean: Mapping[Part, ScoredItems],
    part: Part,
    num_bases: int,
    sets: Sequence[HackSet],
    seed: int,
) -> list[Hack]:
    rng = random.Random(f"{seed} {part}")  # noqa: S311 - a choice of items, not a secret
    own = clean[part].exchanges
    others = [exchange.completion for exchange in clean["states"].exchanges]
    random_token = _token_drawer(served)
    bases = [
        Base(exchange.prompt, exchange.completion, others, random_token)
        for exchange in rng.sample(list(own), min(num_bases, len(own)))
    ]
    return make_hacks(bases, sets, seed)


def _token_drawer(served: ServedModel) -> Callable[[random.Random], str]:
    checkpoint = served.checkpoint
    if checkpoint is None:
        raise CalibrationError("The oracle has nothing to calibrate.")
    tokenizer = checkpoint.tokenizer
    special = set(tokenizer.all_special_ids)
    # The first thousand ids of many vocabularies are single bytes and the like.
    first = 1000 if len(tokenizer) > 4000 else len(tokenizer) // 4
    ids = [token for token in range(first, len(tokenizer)) if token not in special]

    def draw(rng: random.Random) -> str:
        return str(tokenizer.decode([rng.choice(ids)]))

    return draw


def build(
    served: ServedModel,
    scored: Scored,
    *,
    seed: int,
    notes: Mapping[str, Any],
    tell: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Fit, choose, rank and test a calibration on scored items.

    Args:
        served: the model that the items were scored with.
        scored: by `score_all`.
        seed: of trees and folds.
        notes: facts on the data to keep in the artifact.
        tell: hears what is being done.
    """
    tell("Fitting states and counts")
    parts = _Parts.measure(served, scored)
    tell("Choosing taps")
    detectors, parts = _choose_detectors(parts, seed)
    tell("Choosing components")
    unseen = _unseen_scores(parts, seed) if detectors.trees else {}
    choose = parts.clean["combine"]
    clean_scores = detectors.scores(choose.statistics)
    maps = {name: TailMap.of_component(scores) for name, scores in clean_scores.items()}
    admitted, gains = _admit(parts, detectors, maps, unseen)
    sibling_scores = {part: _sibling_scores(detectors, parts.clean[part], seed) for part in ("combine", "conformal")}
    used: dict[Component, TailMap] = {name: maps[name] for name in admitted}
    if sibling_scores["combine"] is not None:
        used["siblings"] = TailMap.of_component(sibling_scores["combine"])
    tell("Ranking and testing")
    ranking = _rank(parts.clean["conformal"], detectors, used, sibling_scores["conformal"])
    facts = _facts(parts, detectors, ranking, seed) | {
        "admitted": list(used),
        "gains": gains,
        "unseen_family": {name: asdict(found) for name, found in _unseen_detections(parts, unseen).items()},
        **notes,
    }
    return parts.calibration(served, detectors, ranking, facts)


@dataclass(frozen=True, slots=True)
class _Parts:
    """The measured parts, and what was fitted on the way."""

    clean: Mapping[Part, Measured]
    hacks: Mapping[Part, Measured]
    ngrams: NgramCounts
    reader: StateReader

    @classmethod
    def measure(cls, served: ServedModel, scored: Scored) -> _Parts:
        base = scored.clean["states"]
        taps = served.info.taps
        forms = [fit_state_form(base.states[:, tap]) for tap in range(len(taps))]
        head = len(taps) - 1
        prompts = np.array(prompt_numbers(base.exchanges), np.int64)
        laplace = fit_laplace(base.states[:, head], base.rewards, prompts, forms[head])
        reader = StateReader(taps, forms, laplace, head)
        checkpoint = served.checkpoint
        if checkpoint is None:
            raise CalibrationError("The oracle has nothing to calibrate.")
        ngrams = NgramCounts.of([sequence.token_ids for sequence in base.sequences], checkpoint.embedding_size)
        texts = TextReader(ngrams, frozenset(checkpoint.tokenizer.all_special_ids))
        return cls(
            clean={part: _measured(items, texts, reader) for part, items in scored.clean.items()},
            hacks={part: _measured(items, texts, reader, kinds) for part, (items, kinds) in scored.hacks.items()},
            ngrams=ngrams,
            reader=reader,
        )

    def kinds(self, *, trained_only: bool = True) -> list[str]:
        """Names of the sets that every part has some of, in the order of the suite."""
        made = set.intersection(*(set(hacks.kinds) for hacks in self.hacks.values()))
        return [entry.name for entry in SUITE if entry.name in made and (entry.trains or not trained_only)]

    def learnt_hacks(self, *, without: str | None = None) -> Matrix:
        """Statistics of the hacks that detectors may learn from, all but one family's."""
        names = [entry.name for entry in SUITE if entry.trains and entry.family != without]
        hacks = self.hacks["detectors"]
        return hacks.statistics[np.isin(hacks.kinds, names)]

    def with_taps(self, kept: Sequence[int]) -> _Parts:
        """Return the same with some of the taps only."""
        reader = self.reader
        columns = [*range(NUM_TEXT), *chain.from_iterable(tap_columns(tap) for tap in kept)]
        narrowed = StateReader(
            tuple(reader.taps[tap] for tap in kept),
            [reader.forms[tap] for tap in kept],
            reader.laplace,
            list(kept).index(reader.head_tap),
        )
        return replace(
            self,
            clean={part: replace(items, statistics=items.statistics[:, columns]) for part, items in self.clean.items()},
            hacks={part: replace(items, statistics=items.statistics[:, columns]) for part, items in self.hacks.items()},
            reader=narrowed,
        )

    def calibration(
        self, served: ServedModel, detectors: Detectors, ranking: Ranking, facts: Mapping[str, Any]
    ) -> Calibration:
        """Put the calibration together. Rewards and lengths are described by all items: no p-value rests on them."""
        held = self.clean["conformal"]
        log_lengths, rewards, prompts = _joined([self.clean[part] for part in self.clean])
        unseen = fit_length_curve(*_joined([self.clean[part] for part in self.clean if part != "conformal"]))
        lengths = _log_lengths(held.scored)
        adjusted = held.scored.rewards - np.interp(lengths, unseen.x, unseen.y)
        checkpoint, settings = served.checkpoint, served.settings
        if checkpoint is None:
            raise CalibrationError("The oracle has nothing to calibrate.")
        template = served.tokenization.template_for(Encoding())
        return Calibration(
            binding=binding_of(checkpoint, pooling=settings.model.pooling, template=template),
            arithmetic=arithmetic_of(served.info),
            facts=dict(facts)
            | {
                "length": {
                    "raw": asdict(length_test(held.scored.rewards, lengths, held.prompts)),
                    "adjusted": asdict(length_test(adjusted, lengths, held.prompts)),
                }
            },
            rewards=Reference.of(rewards),
            lengths=Reference.of(log_lengths),
            length_curve=fit_length_curve(log_lengths, rewards, prompts),
            ngrams=self.ngrams,
            states=self.reader,
            detectors=detectors,
            ranking=ranking,
            monitors=_monitor_reference(held, detectors, ranking),
        )


def tap_columns(tap: int) -> range:
    """Return the columns of a tap's statistics."""
    return range(NUM_TEXT + tap * len(PER_TAP), NUM_TEXT + (tap + 1) * len(PER_TAP))


def _measured(items: ScoredItems, texts: TextReader, reader: StateReader, kinds: Sequence[str] = ()) -> Measured:
    facts = items.read_texts(texts)
    text_statistics = np.stack([cast("Scores", fact.statistics) for fact in facts])
    statistics = np.concatenate([text_statistics, reader.statistics(items.states)], axis=1)
    if not np.isfinite(statistics).all():
        raise CalibrationError("Some hidden states are not finite.")
    return Measured(
        items, facts, statistics, np.array(prompt_numbers(items.exchanges), np.int64), np.array(kinds, np.str_)
    )


def _joined(parts: Sequence[Measured]) -> tuple[Scores, Scores, NDArray[np.int64]]:
    """Return log lengths, rewards and prompt numbers of several parts as one; no prompt is in two of them."""
    first = np.cumsum([0, *(items.prompts.max() + 1 for items in parts)])
    return (
        np.concatenate([_log_lengths(items.scored) for items in parts]),
        np.concatenate([items.scored.rewards for items in parts]),
        np.concatenate([items.prompts + start for items, start in zip(parts, first, strict=False)]),
    )


def _log_lengths(items: ScoredItems) -> Scores:
    return np.log1p(np.array([sequence.num_completion_tokens or 0 for sequence in items.sequences], np.float64))


# --- Choosing --------------------------------------------------------------------------------------------------------


def benefit(clean: Scores, hacks: Measured, scores: Scores, kinds: Sequence[str]) -> float:
    """Return what a detector is chosen by: mean over sets of AUROC and of the share found at 1 percent false alarms.

    Half each, because with a few hundred clean items the second alone is mostly noise.
    """
    found = {kind: detection(clean, hacks.of_kind(kind, scores)) for kind in kinds}
    return mean_over_sets(lambda one: (one.auroc + one.tpr1) / 2, found, kinds)


def _choose_detectors(parts: _Parts, seed: int) -> tuple[Detectors, _Parts]:
    """Fit the detectors with ever more taps, and keep the fewest that do about as well as the best."""
    head = parts.reader.head_tap
    worth = {tap: _tap_benefit(parts, tap) for tap in range(len(parts.reader.taps)) if tap != head}
    order = sorted(worth, key=lambda tap: -worth[tap])
    counts = sorted({min(count, len(order)) for count in (*TAP_CHOICES, len(order))})
    candidates = []
    for count in counts:
        kept = [*sorted(order[:count]), head]
        narrowed = parts.with_taps(kept)
        detectors = _fit_detectors(narrowed, kept.index(order[0]), seed)
        candidates.append((_oe_benefit(narrowed, detectors), detectors, narrowed))
    best = max(gain for gain, _, _ in candidates)
    return next((detectors, narrowed) for gain, detectors, narrowed in candidates if gain >= best - WORTHWHILE)


def _tap_benefit(parts: _Parts, tap: int) -> float:
    gaussian = fit_gaussian(parts.clean["detectors"].statistics, tap_columns(tap))
    return _gaussian_benefit(parts, gaussian)


def _gaussian_benefit(parts: _Parts, gaussian: ShrunkGaussian) -> float:
    clean, hacks = parts.clean["combine"], parts.hacks["combine"]
    return benefit(gaussian.distance(clean.statistics), hacks, gaussian.distance(hacks.statistics), parts.kinds())


def _oe_benefit(parts: _Parts, detectors: Detectors) -> float:
    clean, hacks = parts.clean["combine"], parts.hacks["combine"]
    trees = cast("TreeEnsemble", detectors.trees)
    return benefit(trees.score(clean.statistics), hacks, trees.score(hacks.statistics), parts.kinds())


def _fit_detectors(parts: _Parts, mid_tap: int, seed: int) -> Detectors:
    learn = parts.clean["detectors"]
    everything = range(learn.statistics.shape[1])
    layers, joint = fit_gaussian(learn.statistics, everything[NUM_TEXT:]), fit_gaussian(learn.statistics, everything)
    has_siblings = len(np.unique(learn.prompts)) < len(learn.prompts)
    return Detectors(
        bank=TestBank.of(learn.statistics),
        feature=max((layers, joint), key=lambda gaussian: _gaussian_benefit(parts, gaussian)),
        style=fit_gaussian(learn.statistics, [STATISTICS.index(name) for name in STYLE]),
        mid_tap=mid_tap,
        last_tap=parts.reader.head_tap,
        trees=fit_trees(learn.statistics, parts.learnt_hacks(), everything, seed),
        siblings=fit_siblings(learn.statistics, learn.prompts, joint) if has_siblings else None,
    )


def _unseen_scores(parts: _Parts, seed: int) -> dict[str, tuple[TailMap, Scores]]:
    """Return, for every family of hacks, trees' scores of the combine part's hacks without having seen that family."""
    learn = parts.clean["detectors"].statistics
    scores: dict[str, tuple[TailMap, Scores]] = {}
    for family in dict.fromkeys(entry.family for entry in SUITE if entry.trains):
        trees = fit_trees(learn, parts.learnt_hacks(without=family), range(learn.shape[1]), seed)
        clean = trees.score(parts.clean["combine"].statistics)
        scores[family] = TailMap.of_component(clean), trees.score(parts.hacks["combine"].statistics)
    return scores


def _unseen_detections(parts: _Parts, unseen: Mapping[str, tuple[TailMap, Scores]]) -> dict[str, Detection]:
    hacks = parts.hacks["combine"]
    found = {}
    for entry in SUITE:
        if entry.family in unseen and entry.name in parts.kinds():
            map_, scores = unseen[entry.family]
            found[entry.name] = detection(map_.reference, hacks.of_kind(entry.name, scores))
    return found


def _admit(
    parts: _Parts,
    detectors: Detectors,
    maps: Mapping[Component, TailMap],
    unseen: Mapping[str, tuple[TailMap, Scores]],
) -> tuple[list[Component], dict[str, float]]:
    """Admit components one by one, the most useful first, for as long as the combination gains.

    Of the trees the benefit is the mean of what they do on hacks of known kind and of families that they never saw.
    """
    clean, hacks = parts.clean["combine"], parts.hacks["combine"]
    own = {name: maps[name](scores) for name, scores in detectors.scores(clean.statistics).items()}
    known = {name: maps[name](scores) for name, scores in detectors.scores(hacks.statistics).items()}
    novel = dict(known)
    if unseen:
        families = {entry.name: entry.family for entry in SUITE}
        novel["oe"] = known["oe"].copy()
        for place, kind in enumerate(hacks.kinds):
            if families[kind] in unseen:
                map_, scores = unseen[families[kind]]
                novel["oe"][place] = map_(scores[place : place + 1])[0]
    kinds = parts.kinds()

    def worth(names: Sequence[Component]) -> float:
        combined = np.max([own[name] for name in names], axis=0)
        return float(
            np.mean(
                [
                    benefit(combined, hacks, np.max([view[name] for name in names], axis=0), kinds)
                    for view in (known, novel)
                ]
            )
        )

    admitted: list[Component] = []
    gains: dict[str, float] = {}
    reached = 0.0
    while waiting := [name for name in COMPONENTS if name in own and name not in admitted]:
        best = max(waiting, key=lambda name: worth([*admitted, name]))
        value = worth([*admitted, best])
        if admitted and value < reached + WORTHWHILE:
            break
        admitted.append(best)
        gains[best] = value - reached
        reached = value
    return admitted, gains


# --- Siblings --------------------------------------------------------------------------------------------------------


def _sibling_scores(detectors: Detectors, items: Measured, seed: int) -> Scores | None:
    """Return what siblings would score, NaN for items without any; None where nothing is known of siblings.

    Where enough prompts have `MIN_GROUP` completions, these groups. Else every deviation within a pair takes part in a
    group of `PSEUDO_GROUP` with deviations from other prompts' pairs: their covariance is that of true groups, since a
    pair's deviation is scaled to that of one completion about its prompt's mean.
    """
    siblings = detectors.siblings
    if siblings is None:
        return None
    _, members, sizes = np.unique(items.prompts, return_inverse=True, return_counts=True)
    in_group = sizes[members] >= MIN_GROUP
    scores = np.full(len(items.prompts), np.nan)
    if in_group.sum() >= MIN_GROUPED_ITEMS:
        for prompt in np.flatnonzero(sizes >= MIN_GROUP):
            places = np.flatnonzero(members == prompt)
            scores[places] = siblings.sibling_distance(items.statistics[places])
        return scores
    places = np.flatnonzero(sizes[members] > 1)
    if len(places) < MIN_GROUPED_ITEMS:
        return None
    deviations = sibling_deviations(siblings.standardised(items.statistics), items.prompts)
    rng = np.random.default_rng(seed)
    others = rng.integers(len(places), size=(len(places), PSEUDO_GROUP - 1))
    signs = rng.choice([-1.0, 1.0], size=(*others.shape, 1))
    centred = deviations - (signs * deviations[others]).mean(axis=1)
    centred *= np.sqrt((PSEUDO_GROUP - 1) / PSEUDO_GROUP)
    scores[places] = np.einsum("ij,jk,ik->i", centred, siblings.precision, centred, optimize=True)
    return scores


# --- Ranks, tests and facts ------------------------------------------------------------------------------------------


def _rank(
    items: Measured, detectors: Detectors, maps: Mapping[Component, TailMap], sibling_scores: Scores | None
) -> Ranking:
    scores = detectors.scores(items.statistics)
    references: dict[str, Scores] = {name: np.sort(values) for name, values in scores.items()}
    references["style"] = np.sort(detectors.style.distance(items.statistics))
    surprise = _surprise(maps, scores)
    references["single"] = np.sort(surprise)
    if sibling_scores is not None and "siblings" in maps:
        has = np.isfinite(sibling_scores)
        references["siblings"] = np.sort(sibling_scores[has])
        references["group"] = np.sort(np.maximum(surprise[has], maps["siblings"](sibling_scores[has])))
    return Ranking(maps, references)


def _surprise(maps: Mapping[Component, TailMap], scores: Mapping[Component, Scores]) -> Scores:
    return np.asarray(np.max([maps[name](scores[name]) for name in maps if name in scores], axis=0))


def _facts(parts: _Parts, detectors: Detectors, ranking: Ranking, seed: int) -> dict[str, Any]:
    held, hacks = parts.clean["conformal"], parts.hacks["conformal"]
    clean_scores, hack_scores = detectors.scores(held.statistics), detectors.scores(hacks.statistics)
    clean_columns: dict[str, Scores] = {"combined": _surprise(ranking.maps, clean_scores)}
    hack_columns: dict[str, Scores] = {"combined": _surprise(ranking.maps, hack_scores)}
    for name in clean_scores:
        clean_columns[name], hack_columns[name] = clean_scores[name], hack_scores[name]
    suite = {
        name: {
            kind: asdict(detection(clean_columns[name], hacks.of_kind(kind, hack_columns[name])))
            for kind in parts.kinds(trained_only=False)
        }
        for name in clean_columns
    }
    mean_auroc = float(np.mean([suite["combined"][kind]["auroc"] for kind in parts.kinds()]))
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "versions": {name: version(name) for name in ("reward-service", "torch", "transformers", "scikit-learn")},
        "num_fit": len(parts.clean["states"].scored) + len(parts.clean["detectors"].scored),
        "num_combine": len(parts.clean["combine"].scored),
        "num_conformal": len(held.scored),
        "num_prompts": int(held.prompts.max()) + 1,
        "self_test": self_test(out_of_fold_p(clean_columns["combined"], held.prompts, seed), held.prompts),
        "realised": {
            name: self_test(out_of_fold_p(values, held.prompts, seed), held.prompts)["rates"][0]
            for name, values in clean_columns.items()
        },
        "suite": suite,
        "mean_auroc": mean_auroc,
        "weak": mean_auroc < WEAK_AUROC,
    }


def _monitor_reference(items: Measured, detectors: Detectors, ranking: Ranking) -> MonitorReference:
    reports = OodJudge(detectors, ranking, "", 0.01).judge(items.statistics, [True] * len(items.scored))
    observations = [
        Observation(
            Score(float(reward), ood=report, style=style_report(text)), int(prompt), sequence.num_completion_tokens
        )
        for reward, report, text, prompt, sequence in zip(
            items.scored.rewards, reports, items.texts, items.prompts, items.scored.sequences, strict=True
        )
    ]
    return fit_reference(ObservedItems.of(observations))
