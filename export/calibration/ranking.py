"""The calibration scores among which p-values are ranks, and what was measured with them on the part ``calibrate``.

No detector was fitted to the prompts of that part and nothing was selected on them, so its figures are unbiased.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from export.calibration.hacks import SUITE
from export.calibration.length_fit import fit_length_curve
from export.calibration.measure import detection, length_correlations, out_of_fold_p, self_test
from export.calibration.measured_parts import MeasuredItems, MeasuredParts, joined
from export.calibration.selection import UnseenFamily
from service.diagnostics.calibration_facts import Detection, LengthCorrelations, Rate, SelfTest
from service.diagnostics.conformal import Scores, TailMap
from service.diagnostics.monitors.observation import Observation, ObservedItems
from service.diagnostics.monitors.reference import MonitorReference, fit_reference
from service.diagnostics.ood import Component, Detectors, OodDetector, Ranking
from service.diagnostics.text import style_report
from service.records import Score


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured on the part ``calibrate``; the fields are those of `CalibrationFacts`."""

    self_test: SelfTest
    realised: dict[str, Rate]
    suite: dict[str, dict[str, Detection]]
    mean_auroc: float


def rank_items(
    items: MeasuredItems, detectors: Detectors, maps: Mapping[Component, TailMap], sibling_scores: Scores | None
) -> Ranking:
    """Return the sorted scores of the part ``calibrate``.

    Args:
        items: clean items of that part.
        detectors: fitted detectors.
        maps: maps of the admitted components to -ln p.
        sibling_scores: scores of the items relative to their siblings, NaN without siblings; None where there are none.
    """
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


def evaluate(parts: MeasuredParts, detectors: Detectors, ranking: Ranking, seed: int) -> Evaluation:
    """Measure false-alarm rates, and the detection of every set of hacks, of the combination and of each component."""
    clean, hacks = parts.clean["calibrate"], parts.hacks["calibrate"]
    clean_scores, hack_scores = detectors.scores(clean.statistics), detectors.scores(hacks.statistics)
    clean_columns: dict[str, Scores] = {"combined": _surprise(ranking.maps, clean_scores)}
    hack_columns: dict[str, Scores] = {"combined": _surprise(ranking.maps, hack_scores)}
    for name in clean_scores:
        clean_columns[name], hack_columns[name] = clean_scores[name], hack_scores[name]
    suite = {
        name: {
            kind: detection(clean_columns[name], hacks.of_kind(kind, hack_columns[name]))
            for kind in parts.kinds(trained_only=False)
        }
        for name in clean_columns
    }
    tests = {
        name: self_test(out_of_fold_p(values, clean.prompts, seed), clean.prompts)
        for name, values in clean_columns.items()
    }
    return Evaluation(
        self_test=tests["combined"],
        realised={name: test.rates[0] for name, test in tests.items()},
        suite=suite,
        mean_auroc=float(np.mean([suite["combined"][kind].auroc for kind in parts.kinds()])),
    )


def evaluate_new_kinds(
    parts: MeasuredParts, detectors: Detectors, ranking: Ranking, unseen: Mapping[str, UnseenFamily]
) -> dict[str, Detection]:
    """Measure the detection of each set by the combination, its trees fitted without the set's family.

    Neither the prompts nor the family were seen by any fit; the taps and components were selected with the family.
    """
    clean, hacks = parts.clean["calibrate"], parts.hacks["calibrate"]
    clean_scores, hack_scores = detectors.scores(clean.statistics), detectors.scores(hacks.statistics)
    families = {entry.name: entry.family for entry in SUITE}
    found = {}
    for family, without in unseen.items():
        maps = {name: without.map if name == "oe" else map_ for name, map_ in ranking.maps.items()}
        of_clean = _surprise(maps, clean_scores | {"oe": without.trees.score(clean.statistics)})
        of_hacks = _surprise(maps, hack_scores | {"oe": without.trees.score(hacks.statistics)})
        for kind in parts.kinds():
            if families[kind] == family:
                found[kind] = detection(of_clean, hacks.of_kind(kind, of_hacks))
    return {kind: found[kind] for kind in parts.kinds() if kind in found}


def evaluate_length(parts: MeasuredParts) -> dict[str, LengthCorrelations]:
    """Correlate raw and adjusted rewards of the part ``calibrate`` with length, by a curve fitted to the others."""
    items = parts.clean["calibrate"]
    curve = fit_length_curve(*joined([parts.clean[part] for part in parts.clean if part != "calibrate"]))
    rewards, lengths = items.scored.rewards, items.log_lengths
    adjusted = rewards - np.interp(lengths, curve.x, curve.y)
    return {
        "raw": length_correlations(rewards, lengths, items.prompts),
        "adjusted": length_correlations(adjusted, lengths, items.prompts),
    }


def monitor_reference(items: MeasuredItems, detectors: Detectors, ranking: Ranking) -> MonitorReference:
    """Return the reference of the drift monitors: the signals of the part ``calibrate``."""
    reports = OodDetector(detectors, ranking, "", 0.01).report(items.statistics, [True] * len(items.scored))
    observations = [
        Observation(
            Score(float(reward), ood=report, style=style_report(text)), int(prompt), sequence.num_completion_tokens
        )
        for reward, report, text, prompt, sequence in zip(
            items.scored.rewards, reports, items.texts, items.prompts, items.scored.sequences, strict=True
        )
    ]
    return fit_reference(ObservedItems.of(observations))


def _surprise(maps: Mapping[Component, TailMap], scores: Mapping[Component, Scores]) -> Scores:
    return np.asarray(np.max([maps[name](scores[name]) for name in maps if name in scores], axis=0))
