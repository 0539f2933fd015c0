"""What the numbers mean, in plain words: a question, an answer, and the numbers that it rests on.

Every answer is judged at the careful end of a confidence interval, so that a small file gives cautious answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from training.audit.findings import Findings
from training.audit.gaps import EXPECTED_GAP
from training.audit.intervals import Interval
from training.audit.length_bias import CRITICAL_R_SQUARED, WARN_R
from training.audit.overtraining import TOLERATED_LEAD

Level: TypeAlias = Literal["good", "watch", "bad", "open"]
"""``open``: the data or the arguments do not allow an answer."""

SUSPICIOUS_ACCURACY = 0.90
"""On human preferences; two people agree on 63 (Bai et al. 2022) to 77 percent (Ouyang et al. 2022)."""

HEAVY_OVERLAP = 0.6


@dataclass(frozen=True, slots=True)
class Verdict:
    """One answer, with its reasons."""

    question: str
    answer: str
    level: Level
    reason: str


def verdicts_of(findings: Findings) -> list[Verdict]:
    """Return the verdicts in the order in which a reader wants them."""
    return [
        _chance(findings),
        _above_length(findings),
        _length_detector(findings),
        _suspiciously_high(findings),
        _honest_probabilities(findings),
        _gap(findings),
        _memorises(findings),
    ]


def _chance(findings: Findings) -> Verdict:
    accuracy = findings.accuracy.accuracy
    question = "Better than chance"
    reason = f"Accuracy {_percent(accuracy)} on {findings.accuracy.num_pairs:,} pairs."
    if accuracy.low > 0.5:
        return Verdict(question, "yes", "good", reason)
    if accuracy.high < 0.5:
        return Verdict(question, "no: worse", "bad", f"{reason} Chosen and rejected may have been swapped.")
    return Verdict(question, "no: chance", "bad", f"{reason} The interval holds one half.")


def _above_length(findings: Findings) -> Verdict:
    lead, longer = findings.accuracy.above_length, findings.accuracy.longer_wins
    reason = (
        f"Preferring the longer answer gets {_percent(longer)} on the same pairs; the model leads by {_points(lead)}."
    )
    if lead.low > 0:
        return Verdict("Better than length alone", "yes", "good", reason)
    return Verdict("Better than length alone", "not shown", "bad" if lead.high < 0 else "watch", reason)


def _length_detector(findings: Findings) -> Verdict:
    bias, balanced = findings.length_bias, findings.accuracy.balanced
    reason = (
        f"Within prompts r = {bias.within:+.2f}, r² = {bias.within_r_squared:.2f}; two alarms: |r| > {WARN_R} "
        f"{'fires' if bias.warns else 'is silent'}, r² > {CRITICAL_R_SQUARED} "
        f"{'fires' if bias.is_critical else 'is silent'}. Where length cannot help it is right "
        f"{_percent(balanced)}; it prefers the longer answer in {findings.accuracy.prefers_longer.value:.0%} of pairs."
    )
    if bias.is_critical or (bias.warns and not balanced.low > 0.5):
        return Verdict("Length detector", "yes", "bad", reason)
    if bias.warns:
        return Verdict("Length detector", "no, but biased", "watch", reason)
    return Verdict("Length detector", "no", "good", reason)


def _suspiciously_high(findings: Findings) -> Verdict:
    accuracy, leakage, agreement = findings.accuracy.accuracy, findings.leakage, findings.agreement
    question = "Suspiciously high: leakage?"
    limit, whose = SUSPICIOUS_ACCURACY, "any model of human preferences should reach"
    if agreement is not None:
        limit, whose = agreement.majority.upper, "the disagreement of the reviewers allows"
    if leakage.num_seen:
        seen = f"{leakage.num_seen:,} of {findings.accuracy.num_pairs:,} pairs have a prompt that training has too"
        unseen = f"without them accuracy is {_percent(leakage.accuracy_unseen)}" if leakage.accuracy_unseen else ""
        return Verdict(question, "yes: shared prompts", "bad", f"{seen}; {unseen}.")
    if accuracy.low > limit:
        return Verdict(
            question, "yes: too good", "bad", f"Accuracy {_percent(accuracy)} is above the {limit:.0%} that {whose}."
        )
    below = f"Accuracy is not above the {limit:.0%} that {whose}"
    if leakage.num_train_pairs is None:
        return Verdict(question, "no sign", "open", f"{below}; shared prompts were not looked for (no training pairs).")
    return Verdict(
        question, "no", "good", f"{below}, and no prompt occurs among {leakage.num_train_pairs:,} training pairs."
    )


def _honest_probabilities(findings: Findings) -> Verdict:
    found = findings.probability
    question = "Probabilities honest"
    reason = (
        f"Calibration error {found.ece:.3f}; exact probabilities would show up to {found.honest_ece:.3f} on so many "
        f"pairs. Best temperature {found.temperature:.2f}."
    )
    if found.is_honest:
        return Verdict(question, "yes", "good", reason)
    return Verdict(question, "too sure" if found.temperature > 1 else "too timid", "watch", reason)


def _gap(findings: Findings) -> Verdict:
    gap, low, high = findings.gaps.mean_gap, *EXPECTED_GAP
    heavy = "heavy" if findings.gaps.overlap >= HEAVY_OVERLAP else "little"
    reason = (
        f"Mean gap {gap:.2f}; {low} to {high} with heavy overlap is ordinary. The histograms share "
        f"{findings.gaps.overlap:.0%} of their area ({heavy} overlap). The scale of a reward is its own."
    )
    if gap.high < low:
        return Verdict("Gap of chosen and rejected", "small", "watch", reason)
    if gap.low > high:
        return Verdict("Gap of chosen and rejected", "large", "watch", reason)
    return Verdict("Gap of chosen and rejected", "ordinary", "good", reason)


def _memorises(findings: Findings) -> Verdict:
    found = findings.overtraining
    if found is None:
        return Verdict("Over-trained", "not known", "open", "No training pairs were given to compare with.")
    reason = (
        f"Training pairs {_percent(found.train_accuracy)}, held-out pairs {_percent(found.held_out_accuracy)}: a lead "
        f"of {_points(found.lead)}; mean gap {found.train_gap:.2f} against {found.held_out_gap:.2f}."
    )
    if found.memorises:
        return Verdict("Over-trained", "yes", "bad", f"{reason} More than {TOLERATED_LEAD * 100:.0f} points is memory.")
    return Verdict("Over-trained", "no", "good", reason)


def _percent(share: Interval) -> str:
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"


def _points(difference: Interval) -> str:
    return f"{100 * difference.value:+.1f} points ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
