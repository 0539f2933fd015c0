"""Selects taps and components by what they gain on the hacks of the part ``select``, on the user's own model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

import numpy as np

from export.calibration.fit import fit_gaussian, fit_siblings, fit_trees
from export.calibration.hacks import SUITE
from export.calibration.measure import detection, mean_over_sets
from export.calibration.measured_parts import NUM_TEXT, MeasuredItems, MeasuredParts, tap_columns
from service.diagnostics.calibration_facts import Detection
from service.diagnostics.conformal import Scores, TailMap
from service.diagnostics.detectors import OneSidedTests, ShrunkGaussian
from service.diagnostics.ood import COMPONENTS, Component, Detectors
from service.diagnostics.text import STATISTICS
from service.diagnostics.trees import TreeEnsemble

STYLE = ("md", "emoji", "hedge", "flattery", "rep4", "zratio", "nonascii", "overlap")
"""The statistics behind ``style_p``."""

TAP_COUNTS = (1, 3)
"""Numbers of taps, in addition to the head's, that are tried before all of them."""

MIN_GAIN = 0.005
"""Least gain in benefit for which a component or further taps are accepted."""


@dataclass(frozen=True, slots=True)
class UnseenFamily:
    """Trees that were fitted without one family of hacks, evaluated on the part ``select``."""

    trees: TreeEnsemble

    map: TailMap
    """Fitted to the trees' scores of clean items."""

    scores: Scores
    """The trees' scores of the hacks."""


@dataclass(frozen=True, slots=True)
class Admission:
    """The components of the combination."""

    components: list[Component]
    """In order of admission."""

    gains: dict[str, float]
    """What each one added to the benefit."""


def benefit(clean: Scores, hacks: MeasuredItems, scores: Scores, kinds: Sequence[str]) -> float:
    """Return the criterion of all selections: mean over sets of (AUROC + detected share at 1 percent false alarms) / 2.

    Both, because with a few hundred clean items the second alone is mostly noise.

    Args:
        clean: scores of clean items.
        hacks: the hacks, for their sets.
        scores: scores of the hacks.
        kinds: names of the sets.
    """
    found = {kind: detection(clean, hacks.of_kind(kind, scores)) for kind in kinds}
    return mean_over_sets(lambda one: (one.auroc + one.tpr1) / 2, found, kinds)


def select_detectors(parts: MeasuredParts, seed: int) -> tuple[Detectors, MeasuredParts]:
    """Fit the detectors with increasing numbers of taps, and return the fewest taps that do about as well as the best.

    Returns:
        The detectors, and the parts with the statistics of the selected taps only.
    """
    head = parts.reader.head_tap
    benefits = {tap: _tap_benefit(parts, tap) for tap in range(len(parts.reader.taps)) if tap != head}
    order = sorted(benefits, key=lambda tap: -benefits[tap])
    counts = sorted({min(count, len(order)) for count in (*TAP_COUNTS, len(order))})
    candidates = []
    for count in counts:
        selected = [*sorted(order[:count]), head]
        narrowed = parts.with_taps(selected)
        detectors = _fit_detectors(narrowed, selected.index(order[0]), seed)
        candidates.append((_tree_benefit(narrowed, detectors), detectors, narrowed))
    best = max(gain for gain, _, _ in candidates)
    return next((detectors, narrowed) for gain, detectors, narrowed in candidates if gain >= best - MIN_GAIN)


def fit_without_families(parts: MeasuredParts, seed: int) -> dict[str, UnseenFamily]:
    """Return, for every family of hacks, trees that were fitted without it, evaluated on the part ``select``.

    Fits run side by side, since each leaves the interpreter while it grows a tree.
    """
    clean = parts.clean["fit_detectors"].statistics

    def without(family: str) -> UnseenFamily:
        hacked, weights = parts.training_hacks(without=family)
        trees = fit_trees(clean, hacked, range(clean.shape[1]), seed, weights)
        clean_scores = trees.score(parts.clean["select"].statistics)
        return UnseenFamily(trees, TailMap.of_component(clean_scores), trees.score(parts.hacks["select"].statistics))

    families = list(dict.fromkeys(entry.family for entry in SUITE if entry.trains))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(families, pool.map(without, families), strict=True))


def unseen_detections(parts: MeasuredParts, unseen: Mapping[str, UnseenFamily]) -> dict[str, Detection]:
    """Return how well each set is detected by trees that were fitted without its family."""
    hacks = parts.hacks["select"]
    return {
        entry.name: detection(
            unseen[entry.family].map.reference, hacks.of_kind(entry.name, unseen[entry.family].scores)
        )
        for entry in SUITE
        if entry.family in unseen and entry.name in parts.kinds()
    }


def admit_components(
    parts: MeasuredParts,
    detectors: Detectors,
    maps: Mapping[Component, TailMap],
    unseen: Mapping[str, UnseenFamily],
) -> Admission:
    """Admit components by forward selection: the one with the largest benefit next, as long as the benefit grows.

    The benefit of the trees is the mean of that on hacks of known families and of families that they were not fitted
    to; otherwise they would always win on the hacks that they were trained on.
    """
    clean, hacks = parts.clean["select"], parts.hacks["select"]
    own = {name: maps[name](scores) for name, scores in detectors.scores(clean.statistics).items()}
    known = {name: maps[name](scores) for name, scores in detectors.scores(hacks.statistics).items()}
    novel = known | {"oe": _unseen_surprises(known["oe"], hacks, unseen)} if unseen else known
    kinds = parts.kinds()

    def benefit_of(names: Sequence[Component]) -> float:
        combined = np.max([own[name] for name in names], axis=0)
        hacked = (np.max([view[name] for name in names], axis=0) for view in (known, novel))
        return float(np.mean([benefit(combined, hacks, scores, kinds) for scores in hacked]))

    admitted: list[Component] = []
    gains: dict[str, float] = {}
    reached = 0.0
    while remaining := [name for name in COMPONENTS if name in own and name not in admitted]:
        best = max(remaining, key=lambda name: benefit_of([*admitted, name]))
        value = benefit_of([*admitted, best])
        if admitted and value < reached + MIN_GAIN:
            break
        admitted.append(best)
        gains[best] = value - reached
        reached = value
    return Admission(admitted, gains)


def _unseen_surprises(known: Scores, hacks: MeasuredItems, unseen: Mapping[str, UnseenFamily]) -> Scores:
    """Return the trees' -ln p of hacks, each by trees that were fitted without the hack's family."""
    families = {entry.name: entry.family for entry in SUITE}
    surprises = known.copy()
    for index, kind in enumerate(hacks.kinds):
        if families[kind] in unseen:
            found = unseen[families[kind]]
            surprises[index] = found.map(found.scores[index : index + 1])[0]
    return surprises


def _fit_detectors(parts: MeasuredParts, mid_tap: int, seed: int) -> Detectors:
    clean = parts.clean["fit_detectors"]
    everything = range(clean.statistics.shape[1])
    layers, joint = fit_gaussian(clean.statistics, everything[NUM_TEXT:]), fit_gaussian(clean.statistics, everything)
    hacked, weights = parts.training_hacks()
    has_siblings = len(np.unique(clean.prompts)) < len(clean.prompts)
    return Detectors(
        text_tests=OneSidedTests.of(clean.statistics),
        feature=max((layers, joint), key=lambda gaussian: _gaussian_benefit(parts, gaussian)),
        style=fit_gaussian(clean.statistics, [STATISTICS.index(name) for name in STYLE]),
        mid_tap=mid_tap,
        last_tap=parts.reader.head_tap,
        trees=fit_trees(clean.statistics, hacked, everything, seed, weights),
        siblings=fit_siblings(clean.statistics, clean.prompts, joint) if has_siblings else None,
    )


def _tap_benefit(parts: MeasuredParts, tap: int) -> float:
    gaussian = fit_gaussian(parts.clean["fit_detectors"].statistics, tap_columns(tap))
    return _gaussian_benefit(parts, gaussian)


def _gaussian_benefit(parts: MeasuredParts, gaussian: ShrunkGaussian) -> float:
    clean, hacks = parts.clean["select"], parts.hacks["select"]
    return benefit(gaussian.distance(clean.statistics), hacks, gaussian.distance(hacks.statistics), parts.kinds())


def _tree_benefit(parts: MeasuredParts, detectors: Detectors) -> float:
    clean, hacks = parts.clean["select"], parts.hacks["select"]
    trees = cast("TreeEnsemble", detectors.trees)
    return benefit(trees.score(clean.statistics), hacks, trees.score(hacks.statistics), parts.kinds())
