"""Completes Scores: from rewards, states and texts to everything that is said of the items of one request.

States are measured per batch in the engine's thread, texts in the tokenizer's threads while the forward pass runs;
here both come together, request by request, because siblings can only be compared where all of them are known. No
reward is ever changed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from reward_client.options import DiagnosticsLevel

from service.diagnostics.calibration import Calibration
from service.diagnostics.length import length_report
from service.diagnostics.ood import OodJudge
from service.diagnostics.text import TextFacts, TextReader, style_report
from service.errors import HttpError
from service.records import Exchange, GroupReport, Item, LengthReport, Score, StateTap, TokenSequence

Outcome: TypeAlias = Score | HttpError
ALPHA = 0.01


class Diagnostician:
    """Says what is known of items beside their rewards; safe to call from several threads.

    Args:
        calibration: of the served model; None where there is none, and then what needs one is None too.
        special_ids: the tokenizer's special tokens.
        alpha: p-values up to this are flagged.
        taps: where the engine reads states, the calibration's among them; None: the calibration's, in its order.
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
        self._taps = None if taps is None or taps == own else [taps.index(tap) for tap in own]
        self._texts = TextReader(calibration.ngrams if calibration else None, special_ids)
        self._judge = (
            OodJudge(calibration.detectors, calibration.ranking, calibration.id, alpha) if calibration else None
        )

    def wants_states(self, level: DiagnosticsLevel) -> bool:
        """Whether this level needs the states of the forward pass."""
        return level == "full" and self.calibration is not None

    def read_states(self, rewards: Sequence[float], states: NDArray[np.float32]) -> list[Score]:
        """Measure the states of a batch.

        Args:
            rewards: finite.
            states: float32 [rewards, taps of the engine, hidden].

        Returns:
            For each reward a Score that is still to be completed.
        """
        if self.calibration is None:
            raise ValueError("States are of no use without a calibration")
        reader = self.calibration.states
        if self._taps is not None:
            states = states[:, self._taps]
        with np.errstate(all="ignore"):  # what is not finite is told as that
            statistics, stds = reader.statistics(states), reader.reward_std(states)
        return [
            Score(
                reward,
                reward_std_epistemic=None if stds is None or not math.isfinite(stds[place]) else float(stds[place]),
                traits=tuple(statistics[place].tolist()),
            )
            for place, reward in enumerate(rewards)
        ]

    def read_texts(
        self, items: Sequence[Item], encoded: Sequence[TokenSequence | HttpError], level: DiagnosticsLevel
    ) -> list[TextFacts | None]:
        """Read the completions of items; None for one that has no known completion, is an error, or at ``none``."""
        if level == "none":
            return [None] * len(items)
        return [
            self._texts.read(item, sequence, full=level == "full") if isinstance(sequence, TokenSequence) else None
            for item, sequence in zip(items, encoded, strict=True)
        ]

    def complete(
        self,
        items: Sequence[Item],
        encoded: Sequence[TokenSequence | HttpError],
        outcomes: Sequence[Outcome],
        texts: Sequence[TextFacts | None],
        level: DiagnosticsLevel,
    ) -> list[Outcome]:
        """Complete the Scores of one request to the asked level; errors stay what they are.

        Args:
            items: of the request.
            encoded: what tokenization made of them.
            outcomes: rewards, with the states' part where there is one, or errors.
            texts: what `read_texts` said.
            level: of the request.

        Returns:
            One outcome for each item, in order.
        """
        if level == "none":
            return [Score(outcome.reward) if isinstance(outcome, Score) else outcome for outcome in outcomes]
        scores = {
            place: self._describe(outcome, sequence, text)
            for place, (outcome, sequence, text) in enumerate(zip(outcomes, encoded, texts, strict=True))
            if isinstance(outcome, Score) and isinstance(sequence, TokenSequence)
        }
        groups = siblings_of(items, scores)
        self._add_groups(scores, groups)
        if level == "full" and self._judge is not None:
            self._add_ood(self._judge, scores, texts, groups)
        return [scores.get(place, outcome) for place, outcome in enumerate(outcomes)]

    def _describe(self, score: Score, sequence: TokenSequence, text: TextFacts | None) -> Score:
        length = length_report(sequence)
        style = None if text is None else style_report(text)
        calibration = self.calibration
        if calibration is None:
            return replace(score, length=length, style=style, gap="missing")
        reward, num_tokens = score.reward, length.completion_tokens
        return replace(
            score,
            length=_placed(length, calibration),
            style=style,
            reward_z=calibration.rewards.z(reward),
            reward_percentile=calibration.rewards.percentile(reward),
            reward_length_adjusted=(
                None if num_tokens is None else calibration.length_curve.adjusted(reward, num_tokens)
            ),
            gap="inapplicable" if text is None else None,
        )

    def _add_groups(self, scores: dict[int, Score], groups: Sequence[list[int]]) -> None:
        for group in groups:
            for place, report in zip(group, group_reports([scores[place] for place in group]), strict=True):
                scores[place] = replace(scores[place], group=report)

    def _add_ood(
        self, judge: OodJudge, scores: dict[int, Score], texts: Sequence[TextFacts | None], groups: Sequence[list[int]]
    ) -> None:
        rows: list[NDArray[np.float64]] = []
        places: list[int] = []
        for place, score in scores.items():
            text = texts[place]
            if text is not None and text.statistics is not None and score.traits is not None:
                rows.append(np.concatenate([text.statistics, score.traits]))
                places.append(place)
        if not places:
            return
        row_of = {place: row for row, place in enumerate(places)}
        members = [np.array([row_of[place] for place in group if place in row_of], np.int64) for group in groups]
        statistics = np.stack(rows)
        whole = [not _is_truncated(scores[place]) for place in places]
        reports = judge.judge(statistics, whole, members)
        style_p = judge.style_p(statistics)
        for row, place in enumerate(places):
            style = scores[place].style
            scores[place] = replace(
                scores[place],
                ood=reports[row],
                style=None if style is None else replace(style, style_p=float(style_p[row])),
            )


def siblings_of(items: Sequence[Item], scored: AbstractSet[int] | dict[int, Score]) -> list[list[int]]:
    """Return the places of two or more scored items that answer one prompt: by their group's name, else by the prompt.

    Items of templated text or token ids show no prompt; they are siblings by name only.
    """
    groups: defaultdict[Hashable, list[int]] = defaultdict(list)
    for place in sorted(scored):
        item = items[place]
        if item.group is not None:
            groups["group", item.group].append(place)
        elif isinstance(item.content, Exchange):
            groups["prompt", item.content.prompt].append(place)
    return [places for places in groups.values() if len(places) > 1]


def group_reports(scores: Sequence[Score]) -> list[GroupReport]:
    """Report on the completions of one prompt, two or more, each beside the others."""
    rewards = np.array([score.reward for score in scores])
    correlation = _length_correlation(scores, rewards)
    centred = rewards - rewards.mean()
    return [GroupReport(len(scores), correlation, float(deviation)) for deviation in centred]


def _length_correlation(scores: Sequence[Score], rewards: NDArray[np.float64]) -> float | None:
    lengths = [None if score.length is None else score.length.completion_tokens for score in scores]
    known = [length for length in lengths if length is not None]
    if len(known) < len(scores) or len(known) < 3:
        return None
    log_lengths = np.log1p(known)
    # Compared by range: the rounding of a mean gives equal numbers a deviation.
    if np.ptp(log_lengths) == 0 or np.ptp(rewards) == 0:
        return None
    correlation = float(np.corrcoef(log_lengths, rewards)[0, 1])
    return correlation if math.isfinite(correlation) else None


def _placed(length: LengthReport, calibration: Calibration) -> LengthReport:
    if length.completion_tokens is None:
        return length
    log_length = math.log1p(length.completion_tokens)
    lengths = calibration.lengths
    return replace(length, length_z=lengths.z(log_length), length_percentile=lengths.percentile(log_length))


def _is_truncated(score: Score) -> bool:
    return score.length is not None and score.length.truncated
