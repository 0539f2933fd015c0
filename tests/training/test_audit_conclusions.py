"""The audit recognises models with known defects, and reports no defect of a good model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scored_examples import audited, human_pairs, scored, scored_by

from service.engines.oracle import oracle_reward_of_text
from service.errors import DatasetError
from service.records import Exchange
from training.audit.conclusions import Conclusion, conclusions_of, summary_of
from training.audit.findings import Findings, investigate
from training.audit.intervals import Interval
from training.audit.overtraining import Overtraining
from training.preferences import PreferencePair, Review

PAIRS = human_pairs(300)


def hash_reward(exchange: Exchange) -> float:
    """The oracle's reward: constant for each text, and unrelated to its quality."""
    return oracle_reward_of_text(str(exchange.prompt), exchange.completion_text)


def length_reward(exchange: Exchange) -> float:
    return float(np.log1p(len(exchange.completion_text.split()))) + 0.02 * hash_reward(exchange)


def human_reward(exchange: Exchange) -> float:
    """Depends on what people choose by, with noise, and on length only through it."""
    return 0.35 * min(6, exchange.completion_text.split().count("fox")) + 0.25 * hash_reward(exchange)


def conclusion(findings: Findings, question: str) -> Conclusion:
    (found,) = [each for each in conclusions_of(findings) if each.question == question]
    return found


def swapped_pair(pair: PreferencePair) -> PreferencePair:
    return PreferencePair(pair.prompt, pair.rejected, pair.chosen, pair.id)


def shuffled(pairs: list[PreferencePair]) -> list[PreferencePair]:
    turned = np.random.default_rng(5).random(len(pairs)) < 0.5
    return [
        PreferencePair(pair.prompt, pair.rejected, pair.chosen, pair.id) if turn else pair
        for pair, turn in zip(pairs, turned, strict=True)
    ]


def test_a_model_of_length_is_recognised() -> None:
    """A reward that is length exceeds both thresholds and prefers the longer answer."""
    found = audited(length_reward, shuffled(PAIRS))

    answer = conclusion(found, "Measures mostly length")

    assert (answer.answer, answer.level) == ("yes", "bad")
    assert "|r| > 0.3 exceeded, r² > 0.3 exceeded" in answer.reason
    assert found.accuracy.prefers_longer.value > 0.9


def test_a_biased_preference_model_gets_a_warning() -> None:
    """A model that rewards length, but whose balanced accuracy is above one half, gets a warning and nothing worse."""
    found = audited(lambda exchange: human_reward(exchange) + 0.75 * length_reward(exchange), PAIRS)

    answer = conclusion(found, "Measures mostly length")

    assert (answer.answer, answer.level) == ("no, but biased", "warning")
    assert found.accuracy.balanced.low > 0.5


def test_a_model_of_shuffled_labels_is_at_chance() -> None:
    """Rewards that are unrelated to the labels are at chance, and are not called a model of length."""
    found = audited(hash_reward, shuffled(human_pairs(1000)))

    assert conclusion(found, "Better than chance").answer == "no: chance"
    assert conclusion(found, "Better than length alone").answer == "not shown"
    assert conclusion(found, "Measures mostly length").answer == "no"
    assert summary_of(found) == "On these 1,000 pairs the model is no better than chance."


def test_few_pairs_show_neither_chance_nor_more() -> None:
    """Where the interval of the accuracy contains one half and more than five points beside it, nothing is shown."""
    found = audited(hash_reward, shuffled(PAIRS[:60]))

    answer = conclusion(found, "Better than chance")

    assert (answer.answer, answer.level) == ("not shown", "warning")
    assert "these 60 pairs do not decide" in summary_of(found)


def test_equal_rewards_decide_nothing() -> None:
    """A model that gives every text the same reward: no calibration, no length bias can be told, and the gap is 0."""
    found = audited(lambda exchange: 0.25, PAIRS)

    assert conclusion(found, "Probabilities calibrated").answer == "cannot be told"
    assert conclusion(found, "Measures mostly length").answer == "cannot be told"
    assert not [each for each in conclusions_of(found) if each.level == "good" and "leakage" not in each.question]


def test_tiny_gaps_at_chance_are_not_called_calibrated() -> None:
    """Gaps of a hundredth at chance fit their probabilities near one half at every temperature."""
    found = audited(lambda exchange: 0.002 * hash_reward(exchange), shuffled(PAIRS))

    answer = conclusion(found, "Probabilities calibrated")

    assert (answer.answer, answer.level) == ("cannot be told", "unknown")


def test_exact_probabilities_are_calibrated() -> None:
    """Labels that are drawn with the probability that the rewards give: the answer is yes; with gaps tripled, no."""
    rng = np.random.default_rng(3)
    exact = [
        pair if rng.random() < 1 / (1 + np.exp(-2 * (hash_reward(first) - hash_reward(second)))) else swapped_pair(pair)
        for pair in human_pairs(1500)
        for first, second in [(Exchange(pair.prompt, pair.chosen), Exchange(pair.prompt, pair.rejected))]
    ]

    assert conclusion(audited(lambda one: 2 * hash_reward(one), exact), "Probabilities calibrated").answer == "yes"
    tripled = conclusion(audited(lambda one: 6 * hash_reward(one), exact), "Probabilities calibrated")
    assert (tripled.answer, tripled.level) == ("overconfident", "warning")


@pytest.mark.parametrize(
    ("lead", "answer", "level"),
    [
        (Interval(0.075, -0.009, 0.162), "not shown", "unknown"),
        (Interval(0.02, -0.01, 0.05), "no", "good"),
        (Interval(0.12, 0.06, 0.18), "yes", "bad"),
    ],
    ids=["contains-the-limit", "below", "above"],
)
def test_over_training_follows_from_the_whole_interval(lead: Interval, answer: str, level: str) -> None:
    """A lead whose interval contains the tolerated five points shows neither over-training nor its absence."""
    half = Interval(0.5, 0.4, 0.6)
    found = audited(human_reward, PAIRS)
    with_lead = replace(found, overtraining=Overtraining(100, half, half, lead, 0.5, 0.00123, 0.6, 0.6))

    over_trained = conclusion(with_lead, "Over-trained")

    assert (over_trained.answer, over_trained.level) == (answer, level)
    assert "mean gap 0.500 against 0.00123" in over_trained.reason


def test_the_summary_names_what_is_not_decided() -> None:
    """A good model's one sentence says what was shown and which questions the data leave open."""
    summary = summary_of(audited(human_reward, PAIRS))

    assert summary.startswith("The model predicts preferences better than chance and better than length")
    assert "over-trained" in summary
    assert summary.count(".") == 1


def test_swapped_labels_are_detected() -> None:
    """An accuracy significantly below one half means that chosen and rejected are swapped."""
    swapped = [PreferencePair(pair.prompt, pair.rejected, pair.chosen, pair.id) for pair in PAIRS]

    assert conclusion(audited(human_reward, swapped), "Better than chance").answer == "no: worse"


def test_a_good_model_has_no_bad_conclusion() -> None:
    """It is above chance and above length, does not measure mostly length, and has no sign of leakage."""
    found = audited(human_reward, PAIRS, train_pairs=human_pairs(200, seed=1, prefix="training"))

    assert conclusion(found, "Better than chance").level == "good"
    assert conclusion(found, "Better than length alone").level == "good"
    assert conclusion(found, "Measures mostly length").answer == "no"
    assert conclusion(found, "Suspiciously high: leakage?").answer == "no"
    assert not [each for each in conclusions_of(found) if each.level == "bad"]


def test_shared_prompts_are_reported_as_leakage() -> None:
    """Audited prompts that are in the training pairs are counted, and the accuracy without them is given."""
    found = audited(human_reward, PAIRS, train_pairs=[*PAIRS[:30], *human_pairs(50, seed=1)])

    answer = conclusion(found, "Suspiciously high: leakage?")

    assert (answer.answer, answer.level) == ("yes: shared prompts", "bad")
    assert "30 of 300 pairs" in answer.reason
    assert "accuracy on the others: " in answer.reason


def test_an_accuracy_that_is_too_high_is_suspicious() -> None:
    """A model that is nearly always right is suspicious even where no training pairs are given."""
    found = audited(lambda exchange: float(exchange.completion_text.count("fox")), PAIRS)

    answer = conclusion(found, "Suspiciously high: leakage?")

    assert (answer.answer, answer.level) == ("yes: too good", "bad")


def test_the_ceiling_follows_from_annotator_agreement() -> None:
    """Where annotators disagree, an accuracy below the default limit of 90 percent is suspicious too."""
    rng = np.random.default_rng(0)
    disputed = [
        PreferencePair(
            pair.prompt,
            pair.chosen,
            pair.rejected,
            pair.id,
            reviews=tuple(Review(str(n), "chosen" if rng.random() < 0.7 else "rejected") for n in range(2)),
        )
        for pair in PAIRS
    ]

    found = audited(lambda exchange: human_reward(exchange) - 0.15 * hash_reward(exchange), disputed)

    assert found.annotator_agreement is not None
    assert found.annotator_agreement.majority.upper < 0.75 < found.accuracy.accuracy.low
    assert conclusion(found, "Suspiciously high: leakage?").answer == "yes: too good"
    assert "disagreement of the annotators" in conclusion(found, "Suspiciously high: leakage?").reason


def test_over_training_is_detected() -> None:
    """A model that is right on its training pairs and at chance on others is over-trained."""
    trained = {pair.chosen for pair in PAIRS}

    def memorised(exchange: Exchange) -> float:
        return 3.0 if exchange.completion_text in trained else 0.5 * hash_reward(exchange)

    new = human_pairs(200, seed=9)
    found = audited(memorised, new, trained=scored_by(memorised, PAIRS))

    assert conclusion(found, "Over-trained").answer == "yes"
    assert conclusion(audited(memorised, new), "Over-trained").level == "unknown"


@pytest.mark.parametrize(("factor", "answer"), [(0.05, "small"), (0.4, "usual"), (0.6, "not shown"), (5.0, "large")])
def test_the_gap_is_compared_with_usual_ones(factor: float, answer: str) -> None:
    """A mean gap of 0.5 to 1.0 is usual; since the scale of rewards is arbitrary, no gap is called bad."""
    found = audited(lambda exchange: factor * human_reward(exchange) / 1.05 * 1.5, PAIRS)

    answered = conclusion(found, "Gap of chosen and rejected")

    assert answered.answer == answer
    assert answered.level in {"good", "warning", "unknown"}


def test_too_few_pairs_are_refused() -> None:
    """The message gives the number of pairs with and without rewards, and the reasons."""
    few = replace(scored([1.0] * 5), failures={"The item has too many tokens": 7})

    with pytest.raises(DatasetError, match=r"5 pairs have rewards, and 7 have none \(7: The item has too many"):
        investigate(few, model={}, data={})


def test_shares_of_no_pairs_are_not_numbers() -> None:
    """Pairs of identical completions: what needs lengths that differ cannot be told, and nothing is "nan"."""
    ties = [PreferencePair(f"{n}", f"answer {n}", f"answer {n}") for n in range(20)]

    found = conclusions_of(audited(hash_reward, ties))

    reasons = " ".join(conclusion.reason for conclusion in found)
    assert "20 of them have identical completions" in reasons
    assert "Rewards or lengths do not vary within prompts." in reasons
    assert "nan" not in reasons


def test_pairs_without_a_reward_are_left_out_and_counted() -> None:
    """A completion without a reward excludes its pair; the order of the others does not change."""
    failing = PAIRS[3].rejected

    found = audited(lambda exchange: None if exchange.completion_text == failing else human_reward(exchange), PAIRS)

    assert found.scored.failures == {"no reward": 1}
    assert len(found.scored) == len(PAIRS) - 1
    assert PAIRS[3] not in found.scored.pairs
