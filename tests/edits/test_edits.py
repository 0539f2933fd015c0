"""Edits of a completion: each does what its name says, and leaves the rest of the answer as it was."""

from __future__ import annotations

import json
import random
from html.parser import HTMLParser

import pytest

from service.diagnostics.lexicon import count_style_markers
from service.edits import edits, facts, formats
from service.edits.edits import Change, Draft
from service.edits.phrases import WORDINGS
from service.edits.probe import EDITS

ANSWER = "Boil the egg for 7 minutes. Then cool it:\n\n1. Take cold water.\n2. Wait, and peel it."
DRAFT = Draft(ANSWER, "How long should an egg boil?", ("Another answer.", "A third one."))
PHRASES = WORDINGS[0]
CHANGES: tuple[Change, ...] = (
    *(edit.change for edit in EDITS),
    edits.capitalize,
    edits.praise_within,
    edits.add_hedge_words,
    edits.add_figures,
    edits.speak_for_user,
    facts.swap_numbers,
    formats.wrap_json,
    formats.wrap_html,
)


def made(change: Change, strength: int = 1, draft: Draft = DRAFT, seed: int = 0) -> str:
    return change(draft, random.Random(seed), strength, PHRASES)


@pytest.mark.parametrize("change", dict.fromkeys(CHANGES), ids=lambda change: change.__name__)
def test_an_edit_takes_any_text(change: Change) -> None:
    """Blank, one-word, one-sentence and Chinese completions have a result at every strength, the same for a seed."""
    for text in ("", " \n", "one", "One sentence.", "\u4f60\u597d\u3002", "9" * 6000):
        for strength in (1, 2, 9):
            draft = Draft(text, "", ())
            assert made(change, strength, draft) == made(change, strength, draft)


@pytest.mark.parametrize(
    "change",
    [edits.add_padding, edits.add_hedges, edits.add_emoji, edits.add_headers, edits.add_figures, edits.embolden],
)
def test_whitespace_and_words_of_the_answer_remain(change: Change) -> None:
    """What is added does not remove a word, and blank lines and list items stay where they were."""
    text = made(change, 2)

    assert "\n\n1. " in text.replace("**", "")
    assert "\n2. " in text.replace("**", "")
    words = iter(text.replace("**", "").lower().split())
    assert all(word in words for word in ANSWER.lower().split())


def test_strength_counts_what_is_added() -> None:
    """Sentences of padding, emoji, hedges and turns of the user are as many as asked for."""
    padded = made(edits.add_padding, 4)

    assert sum(sentence in padded for sentence in PHRASES.padding) == 4
    assert count_style_markers(made(edits.add_emoji, 5)).emoji == 5
    assert sum(hedge in made(edits.add_hedges, 2) for hedge in PHRASES.hedges) == 2
    assert sum(made(edits.speak_for_user, 2).count(turn) for turn in PHRASES.user_turns) == 2


def test_markdown_is_what_the_monitors_count() -> None:
    """Bullets, headers and bold words are markers of the style block."""
    assert count_style_markers(made(edits.make_bullets)).list_items == len(DRAFT.sentences)
    assert count_style_markers(made(edits.make_bullets, 2)).bold > len(DRAFT.sentences)
    assert count_style_markers(made(edits.add_headers, 2)).headers == 2
    assert count_style_markers(made(edits.embolden, 2)).bold >= 2


def test_a_hedged_sentence_goes_on_in_lower_case() -> None:
    """The first word loses its capital, unless it is the pronoun or all capitals."""
    assert [edits.lowered(text) for text in ("Then cool it.", "I see.", "NASA did.", "A b")] == [
        "then cool it.", "I see.", "NASA did.", "a b"
    ]  # fmt: skip


def test_what_is_cut_repeated_or_replaced() -> None:
    """A truncated answer is its first part, a repeated one occurs twice, a swapped one belongs to another prompt."""
    assert ANSWER.startswith(made(edits.truncate))
    assert len(made(edits.truncate, 3).split()) == len(ANSWER.split()) // 4
    assert made(edits.repeat_answer).count(ANSWER) == 2
    assert made(edits.swap_answer) in DRAFT.others
    assert DRAFT.question in made(edits.restate_question)


def test_wrong_facts_read_like_the_answer() -> None:
    """Numbers change and have as many digits; without numbers a word becomes its opposite."""
    swapped = made(facts.swap_numbers, 1)

    assert swapped != ANSWER
    assert len(swapped) == len(ANSWER)
    assert made(facts.swap_numbers, 1, Draft("Salt is good.", "")) == "Salt is not good."


@pytest.mark.parametrize("strength", [1, 2])
def test_formats_can_be_parsed(strength: int) -> None:
    """The JSON is valid, and every HTML element is closed."""
    open_tags: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, _attrs: list[tuple[str, str | None]]) -> None:
            open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    assert isinstance(json.loads(made(formats.wrap_json, strength)), dict)
    Tags().feed(made(formats.wrap_html, strength))
    assert not open_tags


def test_wordings_have_no_phrase_in_common() -> None:
    """What detectors are fitted to never occurs in what they are evaluated on."""
    for name in PHRASES.__slots__:
        lists = [set(getattr(wording, name)) for wording in WORDINGS]
        assert all(len(one) >= 2 for one in lists)
        assert sum(map(len, lists)) == len(set.union(*lists))
