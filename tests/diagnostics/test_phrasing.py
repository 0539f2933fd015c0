"""The statistics of a completion's wording, and the hashes of its phrases."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from service.diagnostics.lexicon import count_style_markers
from service.diagnostics.phrasing import (
    MAX_PHRASES,
    PHRASE_BITS,
    PHRASE_KINDS,
    WORDING,
    Wording,
    read_wording,
    shown,
    words_of,
)
from service.diagnostics.split_text import split_text
from service.diagnostics.text import wording_of
from service.diagnostics.word_classes import CLASSES
from service.records import Exchange

NAMES = [statistic.name for statistic in WORDING]


def read(text: str, prompt: str = "How do I boil an egg?") -> Wording:
    return read_wording(split_text(text), words_of(prompt), count_style_markers(text), hash(prompt), 2.5)


def value(text: str, name: str) -> float:
    index = NAMES.index(name)
    return shown(WORDING[index], float(read(text).values[index]))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("words", "One two three. Four five!", 5),
        ("sentences", "One two three. Four five!\nSix", 3),
        ("sentence_length", "One two three. Four five six.", 3),
        ("word_length", "aa bbbb", 3),
        ("distinct_words", "the egg the egg", 50),
        ("common_word_sentences", "There is more to it than that. Boil the egg.", 1),
        ("common_words", "boil it", 50),
        ("hedging_words", "This might work and it could not.", 200 / 7),
        ("second_person_words", "You\u2019ve got your eggs now ok", 200 / 6),
        ("praise_words", "A good pan is a great help to a cook.", 20),
        ("question_marks", "Why? How? Because.", 2),
        ("exclamation_marks", "Yes! No!", 2),
        ("list_items", "- a\n- b\n1. c", 3),
        ("list_items", "\u2022 a\n\u2022 b\n c", 2),
        ("answers_with_lists", "\u2022 a", 100),
        ("headers_and_bold", "# A\n**b** c", 2),
        ("line_breaks", "a\nb\nc\n", 2),
        ("commas", "a, b, c, d", 75),
        ("digits", "12 34 6789", 25),
        ("capitals", "AbcD", 30),
        ("non_ascii", "\u00fcber is here.", 100 / 13),
        ("prompt_words", "boil water", 50),
        ("repeated_phrases", "a b c d a b c d", 20),
        ("token_surprisal", "any text", 2.5),
    ],
)
def test_a_statistic_is_what_its_unit_says(name: str, text: str, expected: float) -> None:
    """Each statistic has the value that follows from its unit, up to its limit."""
    limit = WORDING[NAMES.index(name)].limit

    assert value(text, name) == pytest.approx(min(expected, limit))


@pytest.mark.parametrize("text", ["", " \n", "\u4f60\u597d\u3002", "\ud800", "```\ncode\n```", "?!" * 5000])
def test_every_text_has_statistics(text: str) -> None:
    """A text without English words has finite statistics and few phrases."""
    found = read(text)

    assert np.isfinite(found.values).all()
    assert len(found.values) == len(WORDING)
    assert len(found.phrases) == len(found.kinds) <= 1


def test_phrases_do_not_depend_on_case_and_punctuation() -> None:
    """A phrase has one hash wherever it occurs; another phrase has another; long texts have a limited number."""
    first = read("Well, as far as I know, eggs boil.").phrases
    second = read("EGGS? As far as I know").phrases
    long = read(" ".join(f"w{letter}" for letter in random.Random(0).choices("abcdefgh", k=2000)))

    assert set(first) & set(second) == {*read("as far as i").phrases, *read("far as i know").phrases}
    assert len(long.phrases) == MAX_PHRASES
    assert long.phrases.max() < 1 << PHRASE_BITS


def test_a_phrase_has_the_kinds_of_its_words() -> None:
    """A bit is set for each class of which a phrase has a word, and one where all of its words are common."""
    kinds = read("you might boil eggs there is more to it").kinds

    def of(kind: str) -> list[bool]:
        return [bool(bits >> PHRASE_KINDS.index(kind) & 1) for bits in kinds.tolist()]

    assert of("with_hedging_words") == [True, True, False, False, False, False]
    assert of("with_second_person_words") == [True, False, False, False, False, False]
    assert of("of_common_words") == [False, False, False, False, True, True]
    assert len(PHRASE_KINDS) == len(CLASSES) + 1 == 8


def test_the_text_is_not_shown() -> None:
    """Neither the statistics nor the hashes are part of the printed form."""
    assert "secret" not in repr(read("a secret text of some words"))
    assert math.isnan(wording_of(Exchange("b", "a")).values[NAMES.index("token_surprisal")])
