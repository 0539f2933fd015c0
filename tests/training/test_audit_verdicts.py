"""The audit says of models that are bad in a known way just that, and nothing bad of one that is good."""

from __future__ import annotations

import numpy as np
import pytest
from scored_examples import audited, human_pairs, scored, scored_by

from service.engines.oracle import oracle_reward_of_text
from service.errors import DatasetError
from service.records import Exchange
from training.audit.findings import Findings, investigate
from training.audit.verdicts import Verdict, verdicts_of
from training.preferences import PreferencePair, Review

PAIRS = human_pairs(300)


def hash_reward(exchange: Exchange) -> float:
    """The oracle's: fixed for each text, and without any meaning."""
    return oracle_reward_of_text(str(exchange.prompt), exchange.completion)


def length_reward(exchange: Exchange) -> float:
    return float(np.log1p(len(exchange.completion.split()))) + 0.02 * hash_reward(exchange)


def human_reward(exchange: Exchange) -> float:
    """Sees what people choose by, through some noise, and no length beyond it."""
    return 0.35 * min(6, exchange.completion.split().count("fox")) + 0.25 * hash_reward(exchange)


def verdict(findings: Findings, question: str) -> Verdict:
    (found,) = [each for each in verdicts_of(findings) if each.question == question]
    return found


def shuffled(pairs: list[PreferencePair]) -> list[PreferencePair]:
    turned = np.random.default_rng(5).random(len(pairs)) < 0.5
    return [
        PreferencePair(pair.prompt, pair.rejected, pair.chosen, pair.id) if turn else pair
        for pair, turn in zip(pairs, turned, strict=True)
    ]


def test_a_length_detector_is_called_one() -> None:
    """A reward that is length: both alarms fire, it prefers the longer answer, and is worth a coin without length."""
    found = audited(length_reward, shuffled(PAIRS))

    answer = verdict(found, "Length detector")

    assert (answer.answer, answer.level) == ("yes", "bad")
    assert "|r| > 0.3 fires, r² > 0.3 fires" in answer.reason
    assert found.accuracy.prefers_longer.value > 0.9


def test_a_biased_preference_model_is_no_detector() -> None:
    """One that pays for length, but is right where length cannot help, is watched and not condemned."""
    found = audited(lambda exchange: human_reward(exchange) + 0.75 * length_reward(exchange), PAIRS)

    answer = verdict(found, "Length detector")

    assert (answer.answer, answer.level) == ("no, but biased", "watch")
    assert found.accuracy.balanced.low > 0.5


def test_a_model_of_shuffled_labels_is_at_chance() -> None:
    """Rewards that have nothing to do with the labels: chance, and no length detector either."""
    found = audited(hash_reward, shuffled(PAIRS))

    assert verdict(found, "Better than chance").answer == "no: chance"
    assert verdict(found, "Better than length alone").answer == "not shown"
    assert verdict(found, "Length detector").answer == "no"


def test_a_swapped_label_column_is_noticed() -> None:
    """Below chance beyond doubt is not chance: somebody swapped chosen and rejected."""
    swapped = [PreferencePair(pair.prompt, pair.rejected, pair.chosen, pair.id) for pair in PAIRS]

    assert verdict(audited(human_reward, swapped), "Better than chance").answer == "no: worse"


def test_a_good_model_gets_no_bad_word() -> None:
    """Above chance and above length, no detector, not too good, and nothing leaked."""
    found = audited(human_reward, PAIRS, train_pairs=human_pairs(200, seed=1, prefix="training"))

    assert verdict(found, "Better than chance").level == "good"
    assert verdict(found, "Better than length alone").level == "good"
    assert verdict(found, "Length detector").answer == "no"
    assert verdict(found, "Suspiciously high: leakage?").answer == "no"
    assert not [each for each in verdicts_of(found) if each.level == "bad"]


def test_shared_prompts_are_called_a_leak() -> None:
    """Some audited prompts among the training pairs: said first, with the accuracy without them."""
    found = audited(human_reward, PAIRS, train_pairs=[*PAIRS[:30], *human_pairs(50, seed=1)])

    answer = verdict(found, "Suspiciously high: leakage?")

    assert (answer.answer, answer.level) == ("yes: shared prompts", "bad")
    assert "30 of 300 pairs" in answer.reason
    assert "without them accuracy is" in answer.reason


def test_too_good_to_be_true() -> None:
    """A model that is nearly always right is suspicious even where no leak can be looked for."""
    found = audited(lambda exchange: float(exchange.completion.count("fox")), PAIRS)

    answer = verdict(found, "Suspiciously high: leakage?")

    assert (answer.answer, answer.level) == ("yes: too good", "bad")


def test_the_reviewers_set_the_ceiling() -> None:
    """What is possible at 90 percent without reviewers is too much where the reviewers themselves disagree."""
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

    assert found.agreement is not None
    assert found.agreement.majority.upper < 0.75 < found.accuracy.accuracy.low
    assert verdict(found, "Suspiciously high: leakage?").answer == "yes: too good"
    assert "disagreement of the reviewers" in verdict(found, "Suspiciously high: leakage?").reason


def test_memory_is_told_from_knowledge() -> None:
    """A model that knows its training pairs by heart and others by chance is over-trained."""
    known = {pair.chosen for pair in PAIRS}

    def by_heart(exchange: Exchange) -> float:
        return 3.0 if exchange.completion in known else 0.5 * hash_reward(exchange)

    new = human_pairs(200, seed=9)
    found = audited(by_heart, new, trained=scored_by(by_heart, PAIRS))

    assert verdict(found, "Over-trained").answer == "yes"
    assert verdict(audited(by_heart, new), "Over-trained").level == "open"


@pytest.mark.parametrize(("factor", "answer"), [(0.05, "small"), (0.5, "ordinary"), (5.0, "large")])
def test_the_gap_is_read_against_what_is_ordinary(factor: float, answer: str) -> None:
    """Half to one reward of mean gap is what people expect; the scale floats, so it is never called bad."""
    found = audited(lambda exchange: factor * human_reward(exchange) / 1.05 * 1.5, PAIRS)

    said = verdict(found, "Gap of chosen and rejected")

    assert said.answer == answer
    assert said.level in {"good", "watch"}


def test_a_handful_of_pairs_is_no_audit() -> None:
    """Too few pairs are refused with their number, and with how many had no reward."""
    with pytest.raises(DatasetError, match="5 pairs have rewards"):
        investigate(scored([1.0] * 5), model={}, data={})


def test_pairs_without_a_reward_are_left_out_and_counted() -> None:
    """One failed completion takes its pair along, and lengths stay those of the scored ones."""
    failing = PAIRS[3].rejected

    found = audited(lambda exchange: None if exchange.completion == failing else human_reward(exchange), PAIRS)

    assert found.scored.num_failed == 1
    assert len(found.scored) == len(PAIRS) - 1
    assert PAIRS[3] not in found.scored.pairs
