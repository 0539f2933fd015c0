"""Each measure of the audit has the value of a hand calculation, or recovers known properties of synthetic data."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.special import expit
from scored_examples import scored

from service.records import Message
from training.audit.accuracy import measure_accuracy
from training.audit.gaps import measure_gaps
from training.audit.intervals import bootstrap_interval, share_interval
from training.audit.leakage import measure_leakage, normalise
from training.audit.length_bias import measure_length_bias
from training.audit.overtraining import measure_overtraining
from training.audit.probability import expected_calibration_error, fit_temperature, measure_probability
from training.audit.scored_pairs import Completions, ScoredPairs, distinct_completions, number_distinct
from training.audit.style_slopes import measure_style
from training.audit.top_completions import top_completions
from training.preferences import PreferencePair


def completions(
    rewards: np.ndarray, lengths: np.ndarray, prompts: np.ndarray, texts: list[str] | None = None
) -> Completions:
    pairs = [PreferencePair(f"prompt {prompt}", "a", "b", id=str(n)) for n, prompt in enumerate(prompts)]
    return Completions(texts or [""] * len(rewards), pairs, ["chosen"] * len(rewards), rewards, lengths, prompts)


def test_wilsons_interval() -> None:
    """60 of 100: 0.502 to 0.691 by Wilson's formula; the ends are never outside 0 and 1."""
    interval = share_interval(np.array([1.0] * 60 + [0.0] * 40), np.arange(100))

    assert (interval.low, interval.high) == pytest.approx((0.502, 0.691), abs=5e-4)
    assert share_interval(np.ones(10), np.arange(10)).high == 1.0


def test_pairs_of_one_prompt_count_as_one() -> None:
    """A hundred pairs of ten prompts, equal within each, count as ten: the interval is sqrt(10) times as wide."""
    wins = np.repeat([1.0, 0.0], 50)
    prompts = np.arange(100) // 10

    alone, together = share_interval(wins, np.arange(100)), share_interval(wins, prompts)

    ratio = (together.high - together.low) / (alone.high - alone.low)
    assert ratio == pytest.approx(np.sqrt(10), rel=0.15)


def test_the_bootstrap_draws_whole_prompts() -> None:
    """In every resample each prompt's values occur equally often, also for prompts with unequal numbers of values."""
    values = np.array([0.0, 1.0, 1.0, 2.0, 2.0, 2.0])
    seen = []

    def count(indices: np.ndarray) -> float:
        seen.append([int((values[indices] == value).sum()) for value in (0.0, 1.0, 2.0)])
        return float(len(indices))

    bootstrap_interval(count, number_distinct(values.tolist()))

    assert all(ones % 2 == 0 and twos % 3 == 0 for _, ones, twos in seen)
    assert len(seen) > 100


def test_accuracy_by_hand() -> None:
    """Two wins, a tie and a loss; the longer completion was chosen once and rejected twice."""
    found = measure_accuracy(scored([1, 2, 0, -1], lengths=[(9, 3), (3, 9), (5, 5), (3, 9)]))

    assert found.accuracy.value == 2.5 / 4
    assert found.longer_wins.value == 1.5 / 4
    assert found.above_length.value == 0.25
    assert found.prefers_longer.value == pytest.approx(2 / 3)
    assert [part.num_pairs for part in found.by_length_ratio] == [2, 0, 1, 0, 1]


def test_a_rule_of_length_has_a_balanced_accuracy_of_one_half() -> None:
    """It is right wherever the longer answer was chosen, wrong elsewhere, and always prefers the longer answer."""
    lengths = [(9, 3)] * 30 + [(3, 9)] * 10
    gaps = [chosen - rejected for chosen, rejected in lengths]

    found = measure_accuracy(scored(gaps, lengths=lengths))

    assert found.accuracy.value == found.longer_wins.value == 0.75
    assert found.balanced.value == 0.5
    assert found.prefers_longer.value == 1.0


def test_calibrated_probabilities_are_distinguished_from_overconfident_ones() -> None:
    """Choices drawn with sigma(gap) are calibrated with temperature 1; with doubled gaps the temperature is 2."""
    rng = np.random.default_rng(0)
    strength = rng.normal(scale=2, size=6000)
    gaps = np.where(rng.random(6000) < expit(strength), strength, -strength)

    calibrated, overconfident = measure_probability(scored(gaps)), measure_probability(scored(2 * gaps))

    assert calibrated.is_calibrated
    assert calibrated.temperature == pytest.approx(1.0, abs=0.06)
    assert not overconfident.is_calibrated
    assert overconfident.temperature == pytest.approx(2.0, abs=0.12)
    assert overconfident.ece_at_temperature < overconfident.ece / 2
    assert overconfident.loss_at_temperature == pytest.approx(calibrated.loss, abs=0.005)


def test_calibration_error_by_hand() -> None:
    """Confidence 0.75 with accuracy 0.5 is an error of 0.25; a model that is never wrong has T near 0."""
    gap = np.log(3)

    assert expected_calibration_error(np.array([gap, -gap] * 50)) == pytest.approx(0.25)
    assert fit_temperature(np.full(50, 0.1)) < 0.05


def test_pooling_can_hide_a_length_bias() -> None:
    """Simpson's paradox: within every prompt the reward is length, over all prompts they are uncorrelated."""
    prompts = np.repeat(np.arange(50), 4)
    lengths = np.tile([10.0, 20.0, 40.0, 80.0], 50)
    topic = np.random.default_rng(0).normal(scale=20, size=50)[prompts]

    bias = measure_length_bias(completions(np.log1p(lengths) + topic, lengths, prompts))

    assert bias.within.value == pytest.approx(1.0)
    assert abs(bias.pearson.value) < 0.15
    assert bias.warns
    assert bias.is_critical


@pytest.mark.parametrize(("r", "warns", "critical"), [(0.2, False, False), (0.45, True, False), (0.7, True, True)])
def test_the_two_thresholds_differ(r: float, warns: bool, critical: bool) -> None:
    """Between |r| of 0.3 and of 0.548 only the first one is exceeded."""
    rng = np.random.default_rng(1)
    length = rng.normal(size=(1000, 4))
    reward = r * length + np.sqrt(1 - r**2) * rng.normal(size=(1000, 4))

    bias = measure_length_bias(completions(reward.ravel(), np.exp(length.ravel() + 5), np.repeat(np.arange(1000), 4)))

    assert bias.within.value == pytest.approx(r, abs=0.05)
    assert (bias.warns, bias.is_critical) == (warns, critical)


def test_constant_rewards_have_a_correlation_of_zero() -> None:
    """The correlation of a constant reward is reported as 0 instead of undefined."""
    bias = measure_length_bias(completions(np.ones(20), np.arange(20.0), np.arange(20) // 2))

    assert (bias.pearson.value, bias.within.value, bias.spearman) == (0.0, 0.0, 0.0)
    assert not bias.warns


def test_overlap_of_equal_and_of_separate_rewards() -> None:
    """Equal distributions have an overlap of 1, separate ones of 0; the gap is the difference of the means."""
    rewards, lengths = np.arange(40.0), np.ones(40)
    same = measure_gaps(ScoredPairs(scored([0] * 40).pairs, rewards, rewards, lengths, lengths))
    apart = measure_gaps(scored([5.0] * 40))

    assert (same.overlap, same.mean_gap.value) == (1.0, 0.0)
    assert (apart.overlap, apart.mean_gap.value) == (0.0, 5.0)


def test_style_slopes_are_recovered() -> None:
    """A reward that is a sum of length and list items has these slopes, whatever the differences between prompts."""
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(100), 4)
    lengths, num_items = rng.integers(20, 200, 400).astype(float), rng.integers(0, 6, 400)
    texts = ["".join(f"- item {n}\n" for n in range(count)) for count in num_items]
    topic = rng.normal(scale=5, size=100)[prompts]

    style = measure_style(
        completions(2 * np.log1p(lengths) + 0.5 * np.log1p(num_items) + topic, lengths, prompts, texts)
    )

    slopes = {slope.feature: slope.per_unit for slope in style.slopes}
    assert slopes == pytest.approx({"length": 2.0, "list_items": 0.5})
    assert style.r_squared == pytest.approx(1.0)
    assert set(style.too_rare) == {"headers", "bold", "emoji", "hedges", "flattery"}


PROMPT = "Tell me, please: how long do I have to boil an egg until it is hard?"


def test_leaked_prompts_are_found_when_slightly_changed() -> None:
    """A prompt is found despite other case, punctuation or an added word; another question is not a match."""
    audited = scored([1, -1, 1, 1], prompts=[PROMPT, "tell me - please! " + PROMPT[17:], PROMPT + " Thanks", "Why?"])
    known = [
        PreferencePair(PROMPT.upper(), "chosen 0", "rejected 0"),
        PreferencePair("How long do I have to boil a potato until it is soft?", "x", "y"),
    ]

    leakage = measure_leakage(audited, known)

    assert (leakage.same_prompt, leakage.similar_prompt, leakage.same_pair) == (2, 1, 1)
    assert leakage.accuracy_seen is not None
    assert leakage.accuracy_unseen is not None
    assert leakage.accuracy_seen.value == pytest.approx(2 / 3)
    assert leakage.accuracy_unseen.value == 1.0


def test_a_conversation_is_compared_as_a_whole() -> None:
    """Conversations with the same first message and different continuations are different prompts."""
    turns = (Message("user", PROMPT), Message("assistant", "Ten minutes."), Message("user", "And a potato, how long?"))
    pair = PreferencePair(turns, "a", "b")

    leakage = measure_leakage(scored([1], prompts=[PROMPT]), [pair])

    assert (leakage.same_prompt, leakage.similar_prompt) == (0, 0)


def test_without_training_pairs_only_repeated_prompts_are_counted() -> None:
    """Counts of what was not searched are None, not 0."""
    leakage = measure_leakage(scored([1, 1, 1], prompts=["a", "a", "b"]), None)

    assert (leakage.repeated, leakage.same_prompt, leakage.num_seen) == (2, None, 0)
    assert normalise("  Who, ME?_\n") == "who me"


def test_a_higher_accuracy_on_training_pairs_is_over_training() -> None:
    """95 against 60 percent is outside the confidence interval; 62 against 60 is inside."""
    held_out = scored([1.0] * 120 + [-1.0] * 80)

    memorised = measure_overtraining(held_out, scored([3.0] * 190 + [-1.0] * 10))
    similar = measure_overtraining(held_out, scored([1.0] * 124 + [-1.0] * 76))

    assert memorised.lead.value == pytest.approx(0.35)
    assert memorised.is_overtrained
    assert not similar.is_overtrained
    assert memorised.train_gap > memorised.held_out_gap


def test_the_highest_completions_have_remarks() -> None:
    """The highest reward is first; conspicuous style is described, and plain prose has no remarks."""
    texts = ["# Title\n" + "- point\n" * 6 + "**Bold**", "So be it.", "Great question! I hope this helps. " * 20]
    shown = top_completions(
        completions(np.array([2.0, 1.0, 3.0]), np.array([30.0, 3.0, 200.0]), np.arange(3), texts),
        "tokens",
        hide_texts=False,
    )

    assert [item.reward for item in shown] == [3.0, 2.0, 1.0]
    assert shown[0].remarks == ["40 flattering phrases", "repetitive (compresses to 7%)"]
    assert shown[1].remarks == ["1 heading", "1 bold span", "6 list items"]
    assert shown[2].remarks == []
    assert shown[2].completion == "So be it."


def test_hidden_texts_are_not_in_the_record() -> None:
    """Neither prompt nor completion is, while the remarks are."""
    (shown,) = top_completions(
        completions(np.ones(1), np.ones(1), np.zeros(1, dtype=np.int64), ["# secret"]), "tokens", hide_texts=True
    )

    assert shown.prompt is None
    assert shown.completion is None
    assert shown.remarks


def test_a_completion_of_several_pairs_counts_once() -> None:
    """A completion that was chosen in one pair and rejected in another is there once, with both sides."""
    pairs = [PreferencePair("p", "best", "middle"), PreferencePair("p", "middle", "worst")]
    found = distinct_completions(
        ScoredPairs(pairs, np.array([3.0, 2.0]), np.array([2.0, 1.0]), np.array([4.0, 6.0]), np.array([6.0, 5.0]))
    )

    assert list(found.texts) == ["best", "middle", "worst"]
    assert list(found.sides) == ["chosen", "both", "rejected"]
    assert found.rewards.tolist() == [3.0, 2.0, 1.0]
    assert found.lengths.tolist() == [4.0, 6.0, 5.0]


def test_completions_of_messages_differ_by_their_calls() -> None:
    """Two calls without a text are two completions, and the same prompt with other tools is another prompt."""
    first, second = ((Message("assistant", None, json.dumps({"tool_calls": [{"id": n}]})),) for n in "12")
    pairs = [PreferencePair("p", first, second), PreferencePair("p", first, second, tools="[{}]")]
    rewards = np.array([2.0, 2.0]), np.array([1.0, 1.0])
    found = distinct_completions(ScoredPairs(pairs, *rewards, np.array([1.0, 1.0]), np.array([1.0, 1.0])))

    assert list(found.texts) == [""] * 4
    assert found.prompts.tolist() == [0, 0, 1, 1]
