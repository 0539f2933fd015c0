"""Answers questions about a reward model in words: a question, an answer, and the figures that it is based on.

Every answer uses the end of the confidence interval that is less favourable to a definite answer, so that a small data
set gives cautious answers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from training.audit.findings import Findings
from training.audit.gaps import EXPECTED_GAP
from training.audit.intervals import Interval
from training.audit.length_bias import CRITICAL_R_SQUARED, WARN_R
from training.audit.overtraining import TOLERATED_LEAD

Level: TypeAlias = Literal["good", "warning", "bad", "unknown"]
"""``unknown``: the data or the arguments do not allow an answer."""

SUSPICIOUS_ACCURACY = 0.90
"""On human preferences. Two people agree on 63 (Bai et al. 2022) to 77 percent of the pairs (Ouyang et al. 2022)."""

LARGE_OVERLAP = 0.6

NO_PAIR = "no pair of that kind"
"""Stands where a share would be of no pairs at all."""


@dataclass(frozen=True, slots=True)
class Conclusion:
    """The answer to one question."""

    question: str
    answer: str
    level: Level

    reason: str
    """The figures that the answer is based on."""


def conclusions_of(findings: Findings) -> list[Conclusion]:
    """Return the conclusions, the most important ones first."""
    return [
        _chance(findings),
        _above_length(findings),
        _mostly_length(findings),
        _suspiciously_high(findings),
        _calibrated_probabilities(findings),
        _gap(findings),
        _overtrained(findings),
    ]


def _chance(findings: Findings) -> Conclusion:
    accuracy = findings.accuracy.accuracy
    question = "Better than chance"
    reason = f"Accuracy {_percent(accuracy)} on {findings.accuracy.num_pairs:,} pairs."
    if ties := findings.scored.num_ties:
        reason += f" {ties:,} of them have identical completions, and a tie counts one half."
    if accuracy.low > 0.5:
        return Conclusion(question, "yes", "good", reason)
    if accuracy.high < 0.5:
        return Conclusion(question, "no: worse", "bad", f"{reason} Chosen and rejected may be swapped.")
    return Conclusion(question, "no: chance", "bad", f"{reason} The interval contains one half.")


def _above_length(findings: Findings) -> Conclusion:
    lead, longer = findings.accuracy.above_length, findings.accuracy.longer_wins
    reason = (
        f"Preferring the longer answer has {_percent(longer)} on the same pairs; the model has {_points(lead)} more."
    )
    if lead.low > 0:
        return Conclusion("Better than length alone", "yes", "good", reason)
    return Conclusion("Better than length alone", "not shown", "bad" if lead.high < 0 else "warning", reason)


def _mostly_length(findings: Findings) -> Conclusion:
    bias, balanced = findings.length_bias, findings.accuracy.balanced
    reason = (
        f"Within prompts r = {bias.within:+.2f}, r² = {bias.within_r_squared:.2f}; thresholds: |r| > {WARN_R} "
        f"{'exceeded' if bias.warns else 'not exceeded'}, r² > {CRITICAL_R_SQUARED} "
        f"{'exceeded' if bias.is_critical else 'not exceeded'}. Balanced accuracy over pairs whose longer and whose "
        f"shorter answer was chosen: {_percent(balanced)}; pairs in "
        f"which it prefers the longer answer: {_percent(findings.accuracy.prefers_longer)}."
    )
    if bias.is_critical or (bias.warns and not balanced.low > 0.5):
        return Conclusion("Measures mostly length", "yes", "bad", reason)
    if bias.warns:
        return Conclusion("Measures mostly length", "no, but biased", "warning", reason)
    return Conclusion("Measures mostly length", "no", "good", reason)


def _suspiciously_high(findings: Findings) -> Conclusion:
    accuracy, leakage, agreement = findings.accuracy.accuracy, findings.leakage, findings.annotator_agreement
    question = "Suspiciously high: leakage?"
    limit, basis = SUSPICIOUS_ACCURACY, "models of human preferences reach"
    if agreement is not None:
        limit, basis = agreement.majority.upper, "the disagreement of the annotators allows"
    if leakage.num_seen:
        seen = f"{leakage.num_seen:,} of {findings.accuracy.num_pairs:,} pairs have a prompt of the training pairs"
        unseen = f"accuracy on the others: {_percent(leakage.accuracy_unseen)}" if leakage.accuracy_unseen else ""
        return Conclusion(question, "yes: shared prompts", "bad", f"{seen}; {unseen}.")
    if accuracy.low > limit:
        return Conclusion(
            question, "yes: too good", "bad", f"Accuracy {_percent(accuracy)} is above the {limit:.0%} that {basis}."
        )
    below = f"Accuracy is not above the {limit:.0%} that {basis}"
    if leakage.num_train_pairs is None:
        return Conclusion(
            question, "no sign", "unknown", f"{below}; no training pairs were given to search for shared prompts."
        )
    return Conclusion(
        question, "no", "good", f"{below}, and no prompt occurs among {leakage.num_train_pairs:,} training pairs."
    )


def _calibrated_probabilities(findings: Findings) -> Conclusion:
    found = findings.probability
    question = "Probabilities calibrated"
    reason = (
        f"Calibration error {found.ece:.3f}; exact probabilities would have up to {found.calibrated_ece:.3f} on as "
        f"many pairs. Best temperature {found.temperature:.2f}."
    )
    if found.is_calibrated:
        return Conclusion(question, "yes", "good", reason)
    return Conclusion(question, "overconfident" if found.temperature > 1 else "underconfident", "warning", reason)


def _gap(findings: Findings) -> Conclusion:
    gap, low, high = findings.gaps.mean_gap, *EXPECTED_GAP
    size = "large" if findings.gaps.overlap >= LARGE_OVERLAP else "small"
    reason = (
        f"Mean gap {gap:.2f}; {low} to {high} with a large overlap is usual. The histograms share "
        f"{findings.gaps.overlap:.0%} of their area ({size} overlap). The scale of a reward is arbitrary."
    )
    if gap.high < low:
        return Conclusion("Gap of chosen and rejected", "small", "warning", reason)
    if gap.low > high:
        return Conclusion("Gap of chosen and rejected", "large", "warning", reason)
    return Conclusion("Gap of chosen and rejected", "usual", "good", reason)


def _overtrained(findings: Findings) -> Conclusion:
    found = findings.overtraining
    if found is None:
        return Conclusion("Over-trained", "not known", "unknown", "No training pairs were given to compare with.")
    reason = (
        f"Accuracy on training pairs {_percent(found.train_accuracy)}, on held-out pairs "
        f"{_percent(found.held_out_accuracy)}: a difference of {_points(found.lead)}; mean gap {found.train_gap:.2f} "
        f"against {found.held_out_gap:.2f}."
    )
    if found.is_overtrained:
        tolerated = f"More than {TOLERATED_LEAD * 100:.0f} points is memorisation."
        return Conclusion("Over-trained", "yes", "bad", f"{reason} {tolerated}")
    return Conclusion("Over-trained", "no", "good", reason)


def _percent(share: Interval) -> str:
    if math.isnan(share.value):
        return NO_PAIR
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"


def _points(difference: Interval) -> str:
    return f"{100 * difference.value:+.1f} points ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
