"""Answers questions about a reward model in words: a question, an answer, and the figures that it is based on.

An answer is definite only if it is right for every value in the 95 percent confidence interval of its figure. Where
the interval contains a threshold the answer is "not shown"; where the data have no information on the question it is
"cannot be told". docs/reward-modelling.md lists the rule of each question.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from training.audit.findings import Findings
from training.audit.gaps import EXPECTED_GAP
from training.audit.intervals import Interval, significant, significant_interval
from training.audit.length_bias import CRITICAL_R_SQUARED, WARN_R
from training.audit.overtraining import TOLERATED_LEAD

Level: TypeAlias = Literal["good", "warning", "bad", "unknown"]
"""``unknown``: the data or the arguments do not allow an answer."""

CHANCE_MARGIN = 0.05
"""An accuracy whose interval is within 0.5 +- this is that of chance; a wider one does not decide."""

CALIBRATED_TEMPERATURES = (0.5, 2.0)
"""Calibrated probabilities have a best temperature within this range: gaps are at most a factor of two off."""

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


def summary_of(findings: Findings) -> str:
    """Return the result of the audit in one sentence: the first serious problem, or what was shown."""
    chance, above, length, leakage = (
        rule(findings) for rule in (_chance, _above_length, _mostly_length, _suspiciously_high)
    )
    pairs = f"these {findings.accuracy.num_pairs:,} pairs"
    if chance.answer == _WORSE:
        return f"The model prefers the rejected answers of {pairs}: chosen and rejected may be swapped."
    if leakage.level == "bad":
        return f"The accuracy on {pairs} cannot be trusted: {leakage.answer.removeprefix('yes: ')}."
    if chance.answer == _CHANCE:
        return f"On {pairs} the model is no better than chance."
    if chance.answer != "yes":
        return f"It is not shown that the model is better than chance: {pairs} do not decide."
    if length.level == "bad":
        return f"The model measures mostly length: on {pairs} length explains its rewards."
    if above.answer != "yes":
        return (
            f"The model is better than chance, but on {pairs} not shown to be better than preferring the longer answer."
        )
    return f"The model predicts preferences better than chance and better than length{_reservations(findings)}."


def _reservations(findings: Findings) -> str:
    """Return what the summary of a good model adds: the questions with another answer than the best."""
    open_ = [each.question.lower() for each in conclusions_of(findings) if each.level == "unknown"]
    warned = [f"{each.question.lower()}: {each.answer}" for each in conclusions_of(findings) if each.level in _PROBLEMS]
    parts = [f"but: {', '.join(warned)}"] if warned else []
    parts += [f"not decided: {', '.join(open_)}"] if open_ else []
    return "".join(f"; {part}" for part in parts)


_WORSE, _CHANCE, _NOT_SHOWN, _CANNOT_TELL = "no: worse", "no: chance", "not shown", "cannot be told"
_PROBLEMS = {"warning", "bad"}


def _chance(findings: Findings) -> Conclusion:
    accuracy = findings.accuracy.accuracy
    question = "Better than chance"
    reason = f"Accuracy {_percent(accuracy)} on {findings.accuracy.num_pairs:,} pairs."
    if ties := findings.scored.num_ties:
        reason += f" {ties:,} of them have identical completions, and a tie counts one half."
    if accuracy.low > 0.5:
        return Conclusion(question, "yes", "good", reason)
    if accuracy.high < 0.5:
        return Conclusion(question, _WORSE, "bad", f"{reason} Chosen and rejected may be swapped.")
    reason = f"{reason} The confidence interval contains 50 %."
    if accuracy.lies_in(0.5 - CHANCE_MARGIN, 0.5 + CHANCE_MARGIN):
        return Conclusion(question, _CHANCE, "bad", reason)
    return Conclusion(question, _NOT_SHOWN, "warning", f"{reason} More pairs make it narrower.")


def _above_length(findings: Findings) -> Conclusion:
    lead, longer = findings.accuracy.above_length, findings.accuracy.longer_wins
    question = "Better than length alone"
    reason = (
        f"Preferring the longer answer has {_percent(longer)} on the same pairs; the model has {_points(lead)} more."
    )
    if lead.low > 0:
        return Conclusion(question, "yes", "good", reason)
    if lead.high < 0:
        return Conclusion(question, "no", "bad", reason)
    return Conclusion(question, _NOT_SHOWN, "warning", reason)


def _mostly_length(findings: Findings) -> Conclusion:
    bias, balanced = findings.length_bias, findings.accuracy.balanced
    question = "Measures mostly length"
    reason = (
        f"Within prompts r = {bias.within:+.2f}, r² = {bias.within_r_squared:.2f}; thresholds: |r| > {WARN_R} "
        f"{'exceeded' if bias.warns else 'not exceeded'}, r² > {CRITICAL_R_SQUARED} "
        f"{'exceeded' if bias.is_critical else 'not exceeded'}. Balanced accuracy over pairs whose longer and whose "
        f"shorter answer was chosen: {_percent(balanced)}; pairs in "
        f"which it prefers the longer answer: {_percent(findings.accuracy.prefers_longer)}."
    )
    if not bias.is_defined:
        return Conclusion(question, _CANNOT_TELL, "unknown", "Rewards or lengths do not vary within prompts.")
    if bias.is_critical or (bias.warns and not balanced.low > 0.5):
        return Conclusion(question, "yes", "bad", reason)
    if bias.warns:
        return Conclusion(question, "no, but biased", "warning", reason)
    if bias.is_excluded:
        return Conclusion(question, "no", "good", reason)
    return Conclusion(question, _NOT_SHOWN, "unknown", reason)


def _suspiciously_high(findings: Findings) -> Conclusion:
    accuracy, leakage, agreement = findings.accuracy.accuracy, findings.leakage, findings.annotator_agreement
    question = "Suspiciously high: leakage?"
    limit, basis = SUSPICIOUS_ACCURACY, "models of human preferences reach"
    if agreement is not None:
        limit, basis = agreement.majority.upper, "the disagreement of the annotators allows"
    if leakage.num_seen:
        seen = f"{leakage.num_seen:,} of {findings.accuracy.num_pairs:,} pairs have a prompt of the training pairs"
        others = f"; accuracy on the others: {_percent(leakage.accuracy_unseen)}" if leakage.accuracy_unseen else ""
        return Conclusion(question, "yes: shared prompts", "bad", f"{seen}{others}.")
    if accuracy.low > limit:
        return Conclusion(
            question, "yes: too good", "bad", f"Accuracy {_percent(accuracy)} is above the {limit:.0%} that {basis}."
        )
    if accuracy.high > limit:
        reason = (
            f"The confidence interval of the accuracy, {_percent(accuracy)}, contains the {limit:.0%} that {basis}."
        )
        return Conclusion(question, _NOT_SHOWN, "unknown", reason)
    below = f"Accuracy is not above the {limit:.0%} that {basis}"
    if leakage.num_train_pairs is None:
        reason = f"{below}; no training pairs were given to search for shared prompts."
        return Conclusion(question, _CANNOT_TELL, "unknown", reason)
    return Conclusion(
        question, "no", "good", f"{below}, and no prompt occurs among {leakage.num_train_pairs:,} training pairs."
    )


def _calibrated_probabilities(findings: Findings) -> Conclusion:
    found = findings.probability
    temperature = found.temperature_interval
    question = "Probabilities calibrated"
    reason = (
        f"Calibration error {found.ece:.3f}; exact probabilities would have up to {found.calibrated_ece:.3f} on as "
        f"many pairs. Best temperature {temperature:.2f}."
    )
    if found.is_calibrated:
        if temperature.lies_in(*CALIBRATED_TEMPERATURES):
            return Conclusion(question, "yes", "good", reason)
        return Conclusion(
            question,
            _CANNOT_TELL,
            "unknown",
            f"{reason} On these pairs much larger or smaller gaps would pass as well.",
        )
    if temperature.low > 1:
        return Conclusion(question, "overconfident", "warning", reason)
    if temperature.high < 1:
        return Conclusion(question, "underconfident", "warning", reason)
    return Conclusion(question, "no", "warning", f"{reason} One temperature does not correct it.")


def _gap(findings: Findings) -> Conclusion:
    gap, low, high = findings.gaps.mean_gap, *EXPECTED_GAP
    question = "Gap of chosen and rejected"
    size = "large" if findings.gaps.overlap >= LARGE_OVERLAP else "small"
    reason = (
        f"Mean gap {significant_interval(gap)}; {low} to {high} with a large overlap is usual. The histograms share "
        f"{findings.gaps.overlap:.0%} of their area ({size} overlap). The scale of a reward is arbitrary."
    )
    if gap.high < low:
        return Conclusion(question, "small", "warning", reason)
    if gap.low > high:
        return Conclusion(question, "large", "warning", reason)
    if gap.lies_in(low, high):
        return Conclusion(question, "usual", "good", reason)
    return Conclusion(question, _NOT_SHOWN, "unknown", reason)


def _overtrained(findings: Findings) -> Conclusion:
    found = findings.overtraining
    question = "Over-trained"
    if found is None:
        return Conclusion(question, _CANNOT_TELL, "unknown", "No training pairs were given to compare with.")
    reason = (
        f"Accuracy on training pairs {_percent(found.train_accuracy)}, on held-out pairs "
        f"{_percent(found.held_out_accuracy)}: a difference of {_points(found.lead)}; mean gap "
        f"{significant(found.train_gap)} against {significant(found.held_out_gap)}. More than "
        f"{TOLERATED_LEAD * 100:.0f} points is memorisation."
    )
    if found.is_overtrained:
        return Conclusion(question, "yes", "bad", reason)
    if found.is_excluded:
        return Conclusion(question, "no", "good", reason)
    return Conclusion(question, _NOT_SHOWN, "unknown", reason)


def _percent(share: Interval) -> str:
    if math.isnan(share.value):
        return NO_PAIR
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"


def _points(difference: Interval) -> str:
    return f"{100 * difference.value:+.1f} points ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
