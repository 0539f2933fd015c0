"""Contrast pairs: each family spoils an answer in its own way, the same way for the same seed and row."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from service.errors import SettingsError
from service.records import Message
from training.contrast import CONTRAST_SOURCE, FAMILIES, MIN_WORDS, Answers, make_contrasts, share_out
from training.contrast_texts import BARE_ANSWERS, CONTENTLESS, INSULTS
from training.preferences import PreferencePair
from training.recipe import Recipe, check_recipe, contrast_counts

NOUNS = ("river", "market", "engine", "garden", "copper", "forest", "letter", "window", "bottle", "signal")


def _pair(number: int) -> PreferencePair:
    noun = NOUNS[number % len(NOUNS)]
    sentences = [f"Part {n} of answer {number} says something else about a {noun}." for n in range(1 + number % 5)]
    prompt = (Message("user", f"What is {noun} {number}?"),)
    return PreferencePair(prompt, " ".join(sentences), "No.", id=f"row-{number}", source="made up")


PAIRS = [_pair(number) for number in range(200)]


def _sentences(text: str) -> list[str]:
    return text.replace(". ", ".\n").split("\n")


SPOILED: dict[str, Callable[[str, str, PreferencePair], bool]] = {
    "other_prompt": lambda _, spoiled, pair: any(
        spoiled == other.chosen and other.prompt != pair.prompt for other in PAIRS
    ),
    "truncated": lambda good, spoiled, _: good.startswith(spoiled) and not spoiled.endswith("."),
    "bare": lambda _, spoiled, __: any(spoiled.startswith(answer) for answer in BARE_ANSWERS),
    "shuffled": lambda good, spoiled, _: sorted(good.split()) == sorted(spoiled.split()),
    "garbled": lambda good, spoiled, _: not set(_sentences(spoiled)) & set(_sentences(good)),
    "restated": lambda _, spoiled, pair: pair.prompt[0].text in spoiled,  # type: ignore[union-attr]
    "contentless": lambda _, spoiled, __: any(spoiled.startswith(sentence) for sentence in CONTENTLESS),
    "padded": lambda good, spoiled, _: good in spoiled and any(sentence in spoiled for sentence in CONTENTLESS),
    "spliced": lambda good, spoiled, _: (
        _sentences(good)[0] in spoiled and any(sentence not in good for sentence in _sentences(spoiled))
    ),
    "repeated": lambda good, spoiled, _: spoiled.count(good) == 3,
    "insulted": lambda good, spoiled, _: spoiled.endswith(good) and spoiled.startswith(INSULTS),
}


def test_every_family_has_a_rule_here() -> None:
    """A new family cannot be added without saying what it does."""
    assert list(SPOILED) == list(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_spoils_an_answer_in_its_own_way(family: str) -> None:
    """The good answer is the row's own or its first sentences; the other one is what the family is named for."""
    contrasts = make_contrasts(PAIRS, {family: 40}, seed=1)
    rows = {pair.id: pair for pair in PAIRS}

    assert len(contrasts) == 40
    for contrast in contrasts:
        pair = rows[contrast.id.split()[0]]
        good, spoiled = contrast.texts
        assert isinstance(pair.chosen, str)
        assert pair.chosen.startswith(good)
        assert good.endswith(".")
        assert len(good.split()) >= MIN_WORDS
        assert (contrast.prompt, contrast.source) == (pair.prompt, CONTRAST_SOURCE + family)
        assert SPOILED[family](good, spoiled, pair), (good, spoiled)


def test_a_seed_always_makes_the_same_pairs() -> None:
    """Pairs depend on the seed and not on the other families; another seed takes other rows."""
    counts = {"bare": 10, "garbled": 10}

    first = make_contrasts(PAIRS, counts, seed=3)

    assert first == make_contrasts(PAIRS, counts, seed=3)
    assert first[10:] == make_contrasts(PAIRS, {"garbled": 10}, seed=3)
    assert first[10:] == make_contrasts(PAIRS, {"garbled": 99}, seed=3)[:10]
    assert {pair.id for pair in first} != {pair.id for pair in make_contrasts(PAIRS, counts, seed=4)}


def test_length_does_not_tell_where_it_can_be_matched() -> None:
    """In families of free length the worse answer is longer about as often as shorter; over several, no way is."""
    matched = make_contrasts(PAIRS, dict.fromkeys(("restated", "contentless"), 150), seed=0)
    several = make_contrasts(PAIRS, dict.fromkeys(("truncated", "other_prompt", "garbled", "padded"), 60), seed=0)

    assert 0.25 < sum(pair.excess_chars > 0 for pair in matched) / len(matched) < 0.75
    ratios = [math.log(len(good) / len(spoiled)) for good, spoiled in (pair.texts for pair in several)]
    assert abs(sum(ratios) / len(ratios)) < 0.4


@pytest.mark.parametrize(
    "chosen",
    [
        "Boil it for eight minutes.",
        "I don\N{RIGHT SINGLE QUOTATION MARK}t know anything about that at all, friend.",
        (Message("assistant", "Hi"),),
    ],
    ids=["short", "no-answer", "messages"],
)
def test_an_answer_that_may_be_no_better_is_not_contrasted(chosen: str | tuple[Message, ...]) -> None:
    """Very short answers, those that say that they are none, and answers that are no text give no contrast pair."""
    assert make_contrasts([PreferencePair("How?", chosen, "No.")], dict.fromkeys(FAMILIES, 5), seed=0) == []


def test_an_answer_to_the_same_question_is_no_other_answer() -> None:
    """Prompts with the same first user message count as one: their answers are on the topic."""
    same = [
        PreferencePair("What is it?", f"It is thing number {n}, which is blue.", "No.", id=str(n)) for n in range(9)
    ]

    assert make_contrasts(same, {"other_prompt": 9}, seed=0) == []
    assert Answers.of(same).draw("another question", 0, 1000, random.Random(0)) is not None


@pytest.mark.parametrize("family", ["other_prompt", "spliced"])
def test_the_same_answer_elsewhere_is_no_other_answer(family: str) -> None:
    """An answer that is also given to other prompts, whole or with more after it, is not what it is spoiled with."""
    answer = "It is thing number one, which is blue. It is also round."
    texts = [answer, answer, f"{answer} So it is."]
    same = [PreferencePair(f"What is {number}?", text, "No.", id=str(number)) for number, text in enumerate(texts)]

    made = make_contrasts(same, {family: 9}, seed=0)
    assert not [pair for pair in made if str(pair.rejected).startswith(answer)]
    assert make_contrasts(same[:2], {family: 9}, seed=0) == []


def test_contrast_pairs_are_shared_out_by_weight() -> None:
    """Half a contrast pair for each pair, three of four in the family of weight 3; none without the option."""
    recipe = Recipe(contrast=0.5, contrast_families=("bare", "padded"), contrast_weights=(1.0, 3.0))

    assert contrast_counts(recipe, 80) == {"bare": 10, "padded": 30}
    assert contrast_counts(Recipe(), 80) == {}
    assert contrast_counts(Recipe(contrast=1.0), 110) == dict.fromkeys(FAMILIES, 10)
    assert share_out(10, {"bare": 1.0}) == {"bare": 10}


@pytest.mark.parametrize(
    ("recipe", "complaint"),
    [
        (Recipe(contrast_families=("bare",), contrast_weights=(1.0,)), "--contrast-families needs --contrast"),
        (Recipe(contrast=1, contrast_families=("bears",), contrast_weights=(1.0,)), "does not know 'bears'"),
        (Recipe(contrast=1, contrast_families=("bare",) * 2, contrast_weights=(1.0,) * 2), "has a name twice"),
        (Recipe(contrast=1, contrast_families=("bare",), contrast_weights=(0.0,)), "not greater than 0"),
        (Recipe(contrast=1, objectives=("a", "b")), "--contrast and --objectives exclude each other"),
    ],
    ids=["no-share", "unknown", "twice", "weight", "objectives"],
)
def test_a_contradiction_is_refused_by_the_option(recipe: Recipe, complaint: str) -> None:
    """Each mistake in the options of contrast pairs is one sentence that names them."""
    with pytest.raises(SettingsError, match=complaint):
        check_recipe(recipe)
