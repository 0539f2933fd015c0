"""Is this item of the kind that the calibration has seen? Several detectors, one conformal p-value.

Each admitted component is mapped to -ln p on a scale of its own, the largest of them is the item's surprise, and the
p-value is the surprise's rank among calibration items. Which components are admitted was measured at calibration; here
nothing is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.conformal import Scores, TailMap, conformal_p
from service.diagnostics.detectors import BANK, Matrix, ShrunkGaussian, TestBank, TreeEnsemble
from service.diagnostics.states import PER_TAP
from service.diagnostics.text import STATISTICS
from service.records import LayerPValues, OodMode, OodReport

Component: TypeAlias = Literal["text", "feature", "feature_mid", "feature_last", "oe", "siblings"]
COMPONENTS: tuple[Component, ...] = ("text", "feature", "feature_mid", "feature_last", "oe")
"""Components of a single item, in the order of their precedence as a reason. ``text``: bank of one-sided tests.
``feature``: Gaussian on statistics of states and text. ``feature_mid``, ``feature_last``: distance of one tap's states.
``oe``: trees that have seen the built-in hacks."""

MODES: tuple[OodMode, ...] = ("single", "group")
Mask: TypeAlias = NDArray[np.bool_]

MIN_GROUP = 5
"""Completions of one prompt from which siblings are compared."""


@dataclass(frozen=True, slots=True)
class Detectors:
    """Everything fitted that turns an item's statistics (text, then five for each tap) into scores.

    ``mid_tap``, ``last_tap``: places of the taps behind ``feature_mid`` and ``feature_last``. ``siblings``: Gaussian on
    deviations from siblings. ``style``: Gaussian on the style statistics; beside the combination, never in it.
    """

    bank: TestBank
    feature: ShrunkGaussian
    style: ShrunkGaussian
    mid_tap: int
    last_tap: int
    trees: TreeEnsemble | None = None
    siblings: ShrunkGaussian | None = None

    def scores(self, statistics: Matrix) -> dict[Component, Scores]:
        """Return the score of every component of single items, float64 [items] each."""
        scores: dict[Component, Scores] = {
            "text": self.bank.surprises(statistics).max(axis=1),
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
    """How scores become p-values.

    ``maps``: of the admitted components, to -ln p. ``references``: sorted scores of calibration items, by component, of
    ``style``, and of the surprise by mode.
    """

    maps: Mapping[Component, TailMap]
    references: Mapping[str, Scores] = field(repr=False)

    def surprises(self, scores: Mapping[Component, Scores]) -> dict[Component, Scores]:
        """Return -ln p of every admitted component that has scores."""
        return {name: self.maps[name](scores[name]) for name in self.maps if name in scores}


@dataclass(frozen=True, slots=True)
class _Verdicts:
    """What the components say of a batch, item by item."""

    surprise: Scores
    reasons: Sequence[str]
    p_components: Mapping[Component, Scores]
    score: Scores


class OodJudge:
    """Judges items by their statistics; a batch at once, in any thread.

    Args:
        detectors: fitted.
        ranking: calibrated.
        calibration_id: named in every report.
        alpha: p-values up to this are flagged: the rate of false alarms.
    """

    def __init__(self, detectors: Detectors, ranking: Ranking, calibration_id: str, alpha: float) -> None:
        self._detectors = detectors
        self._ranking = ranking
        self._calibration_id = calibration_id
        self._alpha = alpha

    @property
    def can_compare_siblings(self) -> bool:
        """Whether the calibration knows how siblings differ."""
        return self._detectors.siblings is not None and "group" in self._ranking.references

    def judge(
        self, statistics: Matrix, whole: Sequence[bool], groups: Sequence[NDArray[np.int64]] = ()
    ) -> list[OodReport]:
        """Report on items.

        Args:
            statistics: float64 [items, 18 + 5 x taps]; NaN or infinity where a state was.
            whole: whether the model read all of an item.
            groups: places of the completions of one prompt; those of `MIN_GROUP` or more are compared with each other.

        Returns:
            One report for each item, in order. An item whose statistics are not finite is flagged as that.
        """
        is_finite: Mask = np.asarray(np.isfinite(statistics).all(axis=1))
        statistics = np.where(is_finite[:, None], statistics, 0.0)
        detectors, references = self._detectors, self._ranking.references
        scores = detectors.scores(statistics)
        scores["siblings"], has_siblings = self._sibling_scores(statistics, is_finite, groups)
        surprises = self._ranking.surprises(scores)
        if "siblings" in surprises:
            surprises["siblings"] = np.where(has_siblings, surprises["siblings"], 0.0)
        stacked = np.stack(list(surprises.values()), axis=1)
        names = list(surprises)
        tests = detectors.bank.surprises(statistics).argmax(axis=1)
        verdicts = _Verdicts(
            surprise=stacked.max(axis=1),
            reasons=[
                reason_of(names[best], int(test)) for best, test in zip(stacked.argmax(axis=1), tests, strict=True)
            ],
            p_components={name: conformal_p(references[name], scores[name]) for name in scores if name in references},
            score=scores["feature"],
        )
        p_values = {mode: conformal_p(references[mode], verdicts.surprise) for mode in MODES if mode in references}
        reports = []
        for place in range(len(statistics)):
            mode: OodMode = "group" if has_siblings[place] else "single"
            resolution = 1.0 / (len(references[mode]) + 1)
            if is_finite[place]:
                reports.append(self._report(verdicts, place, mode, float(p_values[mode][place]), resolution, whole))
            else:
                reports.append(self._not_finite(mode, resolution, whole[place]))
        return reports

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

    def _report(
        self, verdicts: _Verdicts, place: int, mode: OodMode, p_value: float, resolution: float, whole: Sequence[bool]
    ) -> OodReport:
        own = {name: float(values[place]) for name, values in verdicts.p_components.items()}
        return OodReport(
            p_value=p_value,
            flag=p_value <= self._alpha,
            mode=mode,
            surprise=float(verdicts.surprise[place]),
            reason=verdicts.reasons[place],
            resolution=resolution,
            calibration_id=self._calibration_id,
            valid_for_tail=whole[place],
            p_text=own.get("text"),
            p_feature=own.get("feature"),
            p_layers=LayerPValues(own.get("feature_mid"), own.get("feature_last")),
            p_oe=own.get("oe"),
            p_group=own.get("siblings") if mode == "group" else None,
            score=float(verdicts.score[place]),
        )

    def _not_finite(self, mode: OodMode, resolution: float, whole: bool) -> OodReport:
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


def reason_of(component: Component, test: int) -> str:
    """Name a component as ``ood.reason`` does; the text component by the test that spoke loudest."""
    if component == "siblings":
        return "group"
    if component != "text":
        return component
    name, sign = BANK[test]
    return f"text:{name}{'+' if sign > 0 else '-'}"
