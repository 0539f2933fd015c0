"""Out-of-distribution detection: several component detectors, combined into one conformal p-value an item.

Each admitted component is mapped to -ln p on a scale of its own. The largest of them is the item's surprise, and the
p-value is the rank of the surprise among calibration items. Which components are admitted was decided by
``reward-calibrate``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.conformal import Scores, TailMap, conformal_p
from service.diagnostics.detectors import ONE_SIDED_TESTS, Matrix, OneSidedTests, ShrunkGaussian
from service.diagnostics.states import PER_TAP
from service.diagnostics.text import STATISTICS
from service.diagnostics.trees import TreeEnsemble
from service.records import LayerPValues, OodMode, OodReport

Component: TypeAlias = Literal["text", "feature", "feature_mid", "feature_last", "oe", "siblings"]
COMPONENTS: tuple[Component, ...] = ("text", "feature", "feature_mid", "feature_last", "oe")
"""Components of a single item, in their order of precedence as a reason. ``text``: one-sided tests of text statistics.
``feature``: Gaussian on statistics of states and text. ``feature_mid``, ``feature_last``: Mahalanobis distance of one
tap's states. ``oe``: boosted trees trained on the built-in hacks (outlier exposure, Hendrycks et al., 2019)."""

MODES: tuple[OodMode, ...] = ("single", "group")
Mask: TypeAlias = NDArray[np.bool_]

MIN_GROUP = 5
"""Least number of completions of one prompt that are compared with each other."""


@dataclass(frozen=True, slots=True)
class Detectors:
    """The fitted detectors; they map an item's statistics (text, then five for each tap) to scores."""

    text_tests: OneSidedTests
    feature: ShrunkGaussian

    style: ShrunkGaussian
    """Gaussian on the style statistics. Reported as ``style_p`` and not part of the combination."""

    mid_tap: int
    """Index of the tap of ``feature_mid``."""

    last_tap: int
    """Index of the tap of ``feature_last``."""

    trees: TreeEnsemble | None = None

    siblings: ShrunkGaussian | None = None
    """Gaussian on deviations from the other completions of the prompt; None where the calibration had no pairs."""

    def scores(self, statistics: Matrix, text_surprises: Matrix | None = None) -> dict[Component, Scores]:
        """Return the score of every component of single items, float64 [items] each.

        Args:
            statistics: float64 [items, statistics].
            text_surprises: what ``text_tests`` returns for them; None: computed here.
        """
        if text_surprises is None:
            text_surprises = self.text_tests.surprises(statistics)
        scores: dict[Component, Scores] = {
            "text": text_surprises.max(axis=1),
            "feature": self.feature.distance(statistics),
            "feature_mid": statistics[:, distance_column(self.mid_tap)],
            "feature_last": statistics[:, distance_column(self.last_tap)],
        }
        if self.trees is not None:
            scores["oe"] = self.trees.score(statistics)
        return scores


def distance_column(tap: int) -> int:
    """Return the column of an item's statistics that holds the log distance of a tap's states."""
    return len(STATISTICS) + tap * len(PER_TAP) + PER_TAP.index("distance")


@dataclass(frozen=True, slots=True)
class Ranking:
    """The calibration data that map scores to p-values."""

    maps: Mapping[Component, TailMap]
    """Maps each admitted component's scores to -ln p."""

    references: Mapping[str, Scores] = field(repr=False)
    """Sorted scores of calibration items: by component, of ``style``, and of the surprise by mode."""

    def surprises(self, scores: Mapping[Component, Scores]) -> dict[Component, Scores]:
        """Return -ln p of every admitted component that has scores."""
        return {name: self.maps[name](scores[name]) for name in self.maps if name in scores}


@dataclass(frozen=True, slots=True)
class _CombinedScores:
    """The combined scores of a batch, item by item."""

    surprise: list[float]
    p_values: Mapping[OodMode, list[float]]
    reasons: list[str]
    p_components: Mapping[Component, list[float]]
    feature_distance: list[float]


class OodDetector:
    """Reports how unusual items are, by their statistics; a batch at once, safe to call from several threads.

    Args:
        detectors: fitted detectors.
        ranking: calibration data of the p-values.
        calibration_id: named in every report.
        alpha: p-values up to this are flagged; the nominal false-alarm rate.
    """

    def __init__(self, detectors: Detectors, ranking: Ranking, calibration_id: str, alpha: float) -> None:
        self._detectors = detectors
        self._ranking = ranking
        self._calibration_id = calibration_id
        self._alpha = alpha

    @property
    def can_compare_siblings(self) -> bool:
        """Whether the calibration has the distribution of differences between completions of one prompt."""
        return self._detectors.siblings is not None and "group" in self._ranking.references

    def report(
        self, statistics: Matrix, whole: Sequence[bool], groups: Sequence[NDArray[np.int64]] = ()
    ) -> list[OodReport]:
        """Return one report for each item, in order; an item with statistics that are not finite is flagged.

        Args:
            statistics: float64 [items, texts + 5 x taps]; NaN or infinite where a state was.
            whole: whether the model read the whole of each item.
            groups: indices of the completions of one prompt; groups of `MIN_GROUP` or more are compared within.
        """
        is_finite: Mask = np.asarray(np.isfinite(statistics).all(axis=1))
        statistics = np.where(is_finite[:, None], statistics, 0.0)
        tests = self._detectors.text_tests.surprises(statistics)
        scores = self._detectors.scores(statistics, tests)
        scores["siblings"], has_siblings = self._sibling_scores(statistics, is_finite, groups)
        combined = self._combine(tests, scores, has_siblings)
        modes: list[OodMode] = ["group" if compared else "single" for compared in has_siblings.tolist()]
        return [
            self._report(mode, whole[index], combined, index) if finite else self._unusual(mode, whole[index])
            for index, (mode, finite) in enumerate(zip(modes, is_finite.tolist(), strict=True))
        ]

    def style_p(self, statistics: Matrix) -> Scores:
        """Return the conformal p-value of each item's style, float64 [items]."""
        return conformal_p(self._ranking.references["style"], self._detectors.style.distance(statistics))

    def _sibling_scores(
        self, statistics: Matrix, is_finite: Mask, groups: Sequence[NDArray[np.int64]]
    ) -> tuple[Scores, Mask]:
        scores = np.zeros(len(statistics))
        compared = np.zeros(len(statistics), np.bool_)
        siblings = self._detectors.siblings
        if siblings is not None and self.can_compare_siblings:
            for group in groups:
                members = group[is_finite[group]]
                if len(members) >= MIN_GROUP:
                    scores[members] = siblings.sibling_distance(statistics[members])
                    compared[members] = True
        return scores, compared

    def _combine(self, tests: Matrix, scores: Mapping[Component, Scores], has_siblings: Mask) -> _CombinedScores:
        references = self._ranking.references
        surprises = self._ranking.surprises(scores)
        if "siblings" in surprises:
            surprises["siblings"] = np.where(has_siblings, surprises["siblings"], 0.0)
        stacked = np.stack(list(surprises.values()), axis=1)
        names = list(surprises)
        largest = stacked.max(axis=1)
        return _CombinedScores(
            surprise=largest.tolist(),
            p_values={mode: conformal_p(references[mode], largest).tolist() for mode in MODES if mode in references},
            reasons=[
                reason_of(names[best], test)
                for best, test in zip(stacked.argmax(axis=1).tolist(), tests.argmax(axis=1).tolist(), strict=True)
            ],
            p_components={
                name: conformal_p(references[name], scores[name]).tolist() for name in scores if name in references
            },
            feature_distance=scores["feature"].tolist(),
        )

    def _unusual(self, mode: OodMode, whole: bool) -> OodReport:
        """Return the report of an item whose statistics are not finite: the lowest possible p-value."""
        resolution = 1.0 / (len(self._ranking.references[mode]) + 1)
        return OodReport(
            p_value=resolution,
            flag=True,
            mode=mode,
            surprise=float(-np.log(resolution)),
            reason="nonfinite",
            resolution=resolution,
            calibration_id=self._calibration_id,
            valid_for_tail=whole,
        )

    def _report(self, mode: OodMode, whole: bool, combined: _CombinedScores, index: int) -> OodReport:
        own = {name: values[index] for name, values in combined.p_components.items()}
        p_value = combined.p_values[mode][index]
        return OodReport(
            p_value=p_value,
            flag=p_value <= self._alpha,
            mode=mode,
            surprise=combined.surprise[index],
            reason=combined.reasons[index],
            resolution=1.0 / (len(self._ranking.references[mode]) + 1),
            calibration_id=self._calibration_id,
            valid_for_tail=whole,
            p_text=own.get("text"),
            p_feature=own.get("feature"),
            p_layers=LayerPValues(own.get("feature_mid"), own.get("feature_last")),
            p_oe=own.get("oe"),
            p_group=own.get("siblings") if mode == "group" else None,
            score=combined.feature_distance[index],
        )


def reason_of(component: Component, test: int) -> str:
    """Return the value of ``ood.reason`` for a component; the text component is named by its most extreme test.

    Args:
        component: the component with the largest -ln p.
        test: index of the one-sided test with the largest -ln p.
    """
    if component == "siblings":
        return "group"
    if component != "text":
        return component
    name, sign = ONE_SIDED_TESTS[test]
    return f"text:{name}{'+' if sign > 0 else '-'}"
