"""Completes the Scores of one request: adds the diagnostics that follow from rewards, states and texts.

States are measured by batch in the engine's thread, texts in the tokenizer's threads while the forward pass runs. Both
are joined by request, because completions of one prompt can be compared only where all of them are available. Rewards
are never changed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from reward_client.options import DiagnosticsLevel

from service.diagnostics.calibration import Calibration
from service.diagnostics.correlation import pearson_correlation
from service.diagnostics.item_state import ItemState, Outcome, outcomes_of
from service.diagnostics.length import length_report
from service.diagnostics.ood import OodDetector
from service.diagnostics.resampled_heads import disagreement
from service.diagnostics.text import TextFacts, TextReader, style_report
from service.records import Exchange, GroupReport, OodReport, Score, StateTap, TokenSequence

ALPHA = 0.01
"""Default of the p-value up to which an item is flagged."""


class Diagnostician:
    """Computes the diagnostics of items; safe to call from several threads.

    Args:
        calibration: calibration of the served model; without one (None) every field that requires it is None.
        special_ids: ids of the tokenizer's special tokens.
        alpha: p-values up to this are flagged.
        taps: taps of the engine, which include the calibration's; None: the calibration's, in its order.
    """

    def __init__(
        self,
        calibration: Calibration | None,
        special_ids: AbstractSet[int] = frozenset(),
        alpha: float = ALPHA,
        taps: tuple[StateTap, ...] | None = None,
    ) -> None:
        self.calibration = calibration
        own = calibration.states.taps if calibration else ()
        self._tap_indices = None if taps is None or taps == own else [taps.index(tap) for tap in own]
        self._texts = TextReader(calibration.ngrams if calibration else None, special_ids)
        self._ood = (
            OodDetector(calibration.detectors, calibration.ranking, calibration.id, alpha) if calibration else None
        )

    @property
    def text_reader(self) -> TextReader:
        """Computes the text statistics of items."""
        return self._texts

    def needs_states(self, level: DiagnosticsLevel) -> bool:
        """Return whether this level requires the states of the forward pass."""
        return level == "full" and self.calibration is not None

    def read_states(self, rewards: Sequence[float], states: NDArray[np.float32]) -> list[Score]:
        """Compute the statistics of a batch's states.

        Args:
            rewards: finite rewards.
            states: float32 [rewards, taps of the engine, hidden].

        Returns:
            For each reward a Score with the statistics, which `complete` completes.

        Raises:
            ValueError: there is no calibration.
        """
        if self.calibration is None:
            raise ValueError("States cannot be read without a calibration")
        reader = self.calibration.states
        if self._tap_indices is not None:
            states = states[:, self._tap_indices]
        heads = self.calibration.heads
        with np.errstate(all="ignore"):  # states that are not finite are reported as such in the OOD block
            statistics, stds = reader.read(states)
            deviations = None if heads is None else heads.deviations(states[:, reader.head_tap])
            spreads = None if deviations is None else disagreement(deviations)
        scores = []
        for index, reward in enumerate(rewards):
            spread = _finite_at(spreads, index)
            scores.append(
                Score(
                    reward,
                    reward_std_epistemic=_finite_at(stds, index),
                    reward_disagreement=spread,
                    head_deviations=None if spread is None or deviations is None else tuple(deviations[index].tolist()),
                    traits=tuple(statistics[index].tolist()),
                )
            )
        return scores

    def read_texts(self, items: Sequence[ItemState], level: DiagnosticsLevel) -> list[TextFacts | None]:
        """Compute the text statistics of items.

        None at level ``none``, for an item that is an error, and where prompt and completion cannot be separated.
        """
        if level == "none":
            return [None] * len(items)
        known = [(item.item, item.sequence) for item in items if item.sequence is not None]
        texts = iter(self._texts.read_all(known, full=level == "full"))
        return [None if item.sequence is None else next(texts) for item in items]

    def complete(self, items: Sequence[ItemState], level: DiagnosticsLevel) -> list[Outcome]:
        """Complete the Scores of one request to its level; errors are returned unchanged.

        Args:
            items: all items of the request, with the outcomes of the engine and the texts of `read_texts`.
            level: level of the request.

        Returns:
            One outcome for each item, in order.

        Raises:
            InternalError: some item has no outcome.
        """
        outcomes = outcomes_of(items)
        if level == "none":
            return [bare_score(outcome) if isinstance(outcome, Score) else outcome for outcome in outcomes]
        scores = {
            index: self._describe(item.outcome, item.sequence, item.text)
            for index, item in enumerate(items)
            if isinstance(item.outcome, Score) and item.sequence is not None
        }
        groups = siblings_of(items, {index for index, score in scores.items() if score.reward is not None})
        siblings = {
            index: report
            for group in groups
            for index, report in zip(group, group_reports([scores[index] for index in group]), strict=True)
        }
        unusual = self._detected(self._ood, scores, items, groups) if level == "full" and self._ood is not None else {}
        for index, score in scores.items():
            text = items[index].text
            ood, style_p = unusual.get(index, (None, None))
            style = None if text is None else style_report(text, style_p)
            scores[index] = replace(score, style=style, group=siblings.get(index), ood=ood)
        return [scores.get(index, outcome) for index, outcome in enumerate(outcomes)]

    def diagnose(self, items: Sequence[ItemState], level: DiagnosticsLevel) -> list[Outcome]:
        """Read the texts of one request and complete its Scores, as `read_texts` and `complete` do."""
        texts = self.read_texts(items, level)
        return self.complete([replace(item, text=text) for item, text in zip(items, texts, strict=True)], level)

    def _describe(self, score: Score, sequence: TokenSequence, text: TextFacts | None) -> Score:
        """Return a Score with all that concerns neither its text nor other items."""
        calibration = self.calibration
        if calibration is None:
            return replace(score, length=length_report(sequence), gap="missing")
        length = length_report(sequence, calibration.lengths)
        reward, num_tokens = score.reward, length.completion_tokens
        if reward is None or score.own_weights or score.step_outputs:
            # The calibration's rewards are those of other weights, or of whole texts.
            return replace(
                score,
                length=length,
                reward_std_epistemic=None,
                reward_disagreement=None,
                head_deviations=None,
                gap="inapplicable",
            )
        return replace(
            score,
            length=length,
            reward_z=calibration.rewards.z(reward),
            reward_percentile=calibration.rewards.percentile(reward),
            reward_length_adjusted=(
                None if num_tokens is None else calibration.length_curve.adjusted(reward, num_tokens)
            ),
            gap="inapplicable" if text is None else None,
        )

    def _detected(
        self,
        detector: OodDetector,
        scores: Mapping[int, Score],
        items: Sequence[ItemState],
        groups: Sequence[list[int]],
    ) -> dict[int, tuple[OodReport, float]]:
        """Return the OOD block and the style's p-value of each item that has statistics of text and states."""
        rows: dict[int, NDArray[np.float64]] = {}
        for index, score in scores.items():
            text = items[index].text
            if text is not None and text.statistics is not None and score.traits is not None:
                rows[index] = np.concatenate([text.statistics, score.traits])
        if not rows:
            return {}
        row_of = {index: row for row, index in enumerate(rows)}
        members = [np.array([row_of[index] for index in group if index in row_of], np.int64) for group in groups]
        statistics = np.stack(list(rows.values()))
        reports = detector.report(statistics, [not _is_truncated(scores[index]) for index in rows], members)
        return dict(zip(rows, zip(reports, detector.style_p(statistics).tolist(), strict=True), strict=True))


def siblings_of(items: Sequence[ItemState], scored: Collection[int]) -> list[list[int]]:
    """Return the groups of two or more scored items that answer one prompt, as indices.

    Items belong together by the name of their group, otherwise by equal prompts. Items of templated text or token ids
    have no separate prompt; they are grouped by name only.

    Args:
        items: all items of a request.
        scored: indices of those with a Score.
    """
    groups: defaultdict[Hashable, list[int]] = defaultdict(list)
    for index in sorted(scored):
        item = items[index].item
        if item.group is not None:
            groups["group", item.group].append(index)
        elif isinstance(item.content, Exchange):
            groups["prompt", item.content.prompt, item.content.tools].append(index)
    return [indices for indices in groups.values() if len(indices) > 1]


def group_reports(scores: Sequence[Score]) -> list[GroupReport]:
    """Return the group block of each of two or more completions of one prompt, all of which have a reward."""
    rewards = np.array([score.reward for score in scores], np.float64)
    correlation = _length_correlation(scores, rewards)
    centred = rewards - rewards.mean()
    return [
        GroupReport(len(scores), correlation, float(deviation), spread)
        for deviation, spread in zip(centred, _centred_disagreements(scores), strict=True)
    ]


def _centred_disagreements(scores: Sequence[Score]) -> list[float | None]:
    """Return the disagreement about each reward less the group's mean; None where a completion's heads are unknown.

    What the heads add to all completions of a prompt alike is no disagreement about which of them is better.
    """
    rows = [score.head_deviations for score in scores if score.head_deviations is not None]
    if len(rows) < len(scores):
        return [None] * len(scores)
    deviations = np.array(rows, np.float64)
    spreads: list[float | None] = disagreement(deviations - deviations.mean(axis=0)).tolist()
    return spreads


def _length_correlation(scores: Sequence[Score], rewards: NDArray[np.float64]) -> float | None:
    lengths = [None if score.length is None else score.length.completion_tokens for score in scores]
    known = [length for length in lengths if length is not None]
    if len(known) < len(scores) or len(known) < 3:
        return None
    correlation = pearson_correlation(np.log1p(known), rewards)
    return correlation if math.isfinite(correlation) else None


def bare_score(score: Score) -> Score:
    """Return a Score without its diagnostics."""
    return Score(
        score.reward,
        outputs=score.outputs,
        step_outputs=score.step_outputs,
        step_rewards=score.step_rewards,
        own_weights=score.own_weights,
        reward_std=score.reward_std,
    )


def _finite_at(values: NDArray[np.float64] | None, index: int) -> float | None:
    return None if values is None or not math.isfinite(values[index]) else float(values[index])


def _is_truncated(score: Score) -> bool:
    return score.length is not None and score.length.truncated
