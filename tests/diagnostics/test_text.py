"""Text statistics against counts made by hand."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.diagnostics.lexicon import count_style_markers, find_style_markers
from service.diagnostics.ngrams import NgramCounts
from service.diagnostics.repetition import find_repetitions
from service.diagnostics.split_text import split_text
from service.diagnostics.text import (
    STATISTICS,
    TextReader,
    read_chars,
    style_report,
    zlib_ratio,
)
from service.diagnostics.token_facts import PromptTokens, completion_tokens, read_tokens
from service.records import Exchange, Item, TemplatedText, TokenIds, TokenSequence

MARKDOWN = """# Title
## Part
Text with **bold words** and __more__.
- one
* two
3. three
```python
# no header
- no item
**no bold**
```
"""


def test_markdown_is_counted_outside_of_code() -> None:
    """Headers, list items and bold spans count once each; fenced code counts for nothing."""
    markers = count_style_markers(MARKDOWN)

    assert (markers.headers, markers.list_items, markers.bold) == (2, 3, 2)


@pytest.mark.parametrize(
    ("text", "hedges", "flattery"),
    [
        ("It is important to note that it's worth considering.", 2, 0),
        ("Perhaps. Possibly, and likely; unlikely does not count.", 3, 0),
        ("I\u2019m not entirely sure, but it seems to work.", 2, 0),
        ("Great question! You're absolutely right. Hope this helps!", 0, 3),
        ("The questions are open and the water is warm.", 0, 0),
    ],
)
def test_phrases_are_whole_words_in_any_case(text: str, hedges: int, flattery: int) -> None:
    """The lexicon finds its phrases, also with a curly apostrophe, and nothing inside other words."""
    markers = count_style_markers(text)

    assert (markers.hedges, markers.flattery) == (hedges, flattery)


FRAGMENTS = [
    *(
        "# Head",
        "- item",
        "1. one",
        "**bold**",
        "__b__",
        "perhaps",
        "it depends",
        "Great question!",
        "\u2728",
        "```",
        "**",
    ),
    *("\n", " ", "\u0130", "\u03a3", "\u2019", "I\u2019m not sure", "word"),
]
"""Markers, what begins and ends code, and letters that change their length in lower case."""


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=24).map("".join))
def test_spans_are_the_counted_markers(text: str) -> None:
    """Every counted marker has one span of its kind, whatever stands between: code, letters that grow in lower case."""
    spans = find_style_markers(text)

    counts = asdict(count_style_markers(text))
    assert Counter(span.kind for span in spans) == Counter({kind: count for kind, count in counts.items() if count})
    assert all(0 <= span.start < span.end <= len(text) for span in spans)


def test_spans_show_the_marked_text() -> None:
    """The characters of a span are the marker, also behind code and behind letters that grow in lower case."""
    text = "\u0130\u0130 ```\n# no\n``` It\u2019s important to note: **bold**\n## Head\n- item \u2728 Great question"

    found = [(span.kind, text[span.start : span.end]) for span in find_style_markers(text)]

    assert found == [
        ("hedges", "It\u2019s important to note"),
        ("bold", "**bold**"),
        ("headers", "## "),
        ("list_items", "- "),
        ("emoji", "\u2728"),
        ("flattery", "Great question"),
    ]


def test_repetitions_are_the_counted_4_grams() -> None:
    """The tokens of every 4-gram that occurred before are marked, joined where they touch; a first one is not."""
    ids = (1, 2, 3, 4, 9, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5)
    spans = [(2 * index, 2 * index + 1) for index in range(len(ids))]

    assert find_repetitions(ids, spans) == [(10, 17), (20, 29)]
    assert find_repetitions(ids, [(index, index + 1) for index in range(len(ids))]) == [(5, 9), (10, 15)]
    assert read_tokens(ids, PromptTokens(())).repeat4 == pytest.approx(3 / 12)
    assert find_repetitions((1, 2, 3), [(0, 1)] * 3) == []


def test_characters_by_hand() -> None:
    """Every class of characters is counted once, and words of other scripts count as words."""
    chars = read_chars(split_text("Ab1! \u4f60\u597d \U0001f680 don't"))

    assert (chars.chars, chars.words, chars.non_ascii) == (15, 4, 3)
    assert (chars.punctuation, chars.digits, chars.upper) == (2, 1, 1)
    assert chars.word_length == pytest.approx((2 + 5) / 2)
    assert chars.markers.emoji == 1


def test_compression_uses_the_first_characters() -> None:
    """The ratio is zlib's at level 1 over the first 6,000 characters; a very short text has a fixed one."""
    text = "ab" * 5000

    assert zlib_ratio(text) == len(zlib.compress(text[:6000].encode(), 1)) / 6000
    assert zlib_ratio("short") == 0.9


def test_tokens_by_hand() -> None:
    """Five 4-grams of which three differ; five distinct tokens of eight; half of the tokens occur in the prompt."""
    facts = read_tokens((1, 2, 3, 4, 1, 2, 3, 4), PromptTokens((1, 2, 9)))

    assert facts.repeat4 == pytest.approx(1 - 4 / 5)
    assert facts.type_token == pytest.approx(4 / 8)
    assert facts.overlap == pytest.approx(4 / 8)
    assert facts.top4 == 0.0  # too few 4-grams


def test_the_most_frequent_4_gram_counts_in_longer_texts() -> None:
    """Of 24 4-grams one occurs six times, all others once or more rarely than that."""
    facts = read_tokens((1, 2, 3, 4) * 6 + (5, 6, 7), PromptTokens(()))

    assert facts.top4 == pytest.approx(6 / 24)
    assert facts.repeat4 == pytest.approx(1 - 7 / 24)


def test_items_that_are_read_together_have_the_statistics_of_each_alone() -> None:
    """Completions of shared and of other prompts, and items without a separate completion, keep their places."""
    reader = TextReader(NgramCounts.of([(1, 2, 3), (3, 4)], 20), {19})
    texts = ["One. Two!", "", "It\u2019s \u00fcber.\n- a", "One. Two!", "\u0130t is."]
    items = [(Item(TokenIds((1, 2))), TokenSequence((1, 2)))]
    for number in range(40):
        tokens = tuple((number * 7 + place) % 11 for place in range(number))
        prompt = (1, 2, 3, number % 3)
        exchange = Exchange(f"prompt {number % 3}", texts[number % len(texts)])
        items.append((Item(exchange), TokenSequence((*prompt, *tokens, 19), num_prompt_tokens=4)))

    for full in (False, True):
        together = reader.read_all(items, full=full)
        assert together[0] is None
        for found, (item, sequence) in zip(together[1:], items[1:], strict=True):
            alone = reader.read(item, sequence, full=full)
            assert found is not None
            assert alone is not None
            assert (found.chars, found.tokens) == (alone.chars, alone.tokens)
            assert found.wording is not None
            assert alone.wording is not None
            assert found.wording.values.tobytes() == alone.wording.values.tobytes()
            assert found.wording.phrases.tolist() == alone.wording.phrases.tolist()
            assert (found.statistics is None) == (not full)
            assert full is False or found.statistics.tobytes() == alone.statistics.tobytes()  # type: ignore[union-attr]


@pytest.mark.parametrize("ids", [(), (1,), (1, 2, 3)])
def test_short_completions_have_statistics(ids: tuple[int, ...]) -> None:
    """All statistics of completions of 0, 1 and 3 tokens are finite."""
    reader = TextReader(NgramCounts.of([(1, 2, 3)], 10))
    item, sequence = Item(Exchange("p", "")), TokenSequence((5, *ids), num_prompt_tokens=1)

    facts = reader.read(item, sequence, full=True)

    assert facts is not None
    assert facts.statistics is not None
    assert all(map(math.isfinite, facts.statistics))
    assert len(facts.statistics) == len(STATISTICS)


def test_tokens_of_the_template_are_not_part_of_the_completion() -> None:
    """The closing special token and what follows it are removed; one in the middle belongs to the completion."""
    assert completion_tokens((7, 8, 99, 10), {99}) == (7, 8)
    assert completion_tokens((99, 7, 8, 9, 10, 11), {99}) == (99, 7, 8, 9, 10, 11)


@pytest.mark.parametrize("content", [TemplatedText("text"), TokenIds((1, 2))])
def test_without_separate_texts_there_are_no_facts(content: TemplatedText | TokenIds) -> None:
    """Where prompt and completion cannot be separated, the result is None instead of statistics of both."""
    assert TextReader(None).read(Item(content), TokenSequence((1, 2)), full=True) is None


def test_surprisal_by_hand() -> None:
    """Unigrams are smoothed by one; a pair that was counted is expected, one that was not backs off."""
    counts = NgramCounts.of([(1, 2), (1, 2), (3, 4)], vocab_size=5)
    p = {1: 3 / 11, 2: 3 / 11}

    uni, bi = counts.surprisal((1, 2))

    assert uni == pytest.approx(-(math.log(p[1]) + math.log(p[2])) / 2)
    assert bi == pytest.approx(-math.log((2 + 2 * p[2]) / (2 + 2)))
    assert counts.surprisal((1, 4))[1] > bi
    assert counts.surprisal(()) == (0.0, 0.0)


def test_fractions_belong_to_the_full_level() -> None:
    """Below ``full`` the style block has its counts, and None for fractions."""
    reader, item = TextReader(None), Item(Exchange("p", "- one \u00e9"))
    sequence = TokenSequence((1, 2, 3), num_prompt_tokens=1)

    basic, full = (reader.read(item, sequence, full=full) for full in (False, True))

    assert basic is not None
    assert full is not None
    assert style_report(basic).list_items == style_report(full).list_items == 1
    assert style_report(basic).non_ascii is None
    assert style_report(full).non_ascii == pytest.approx(1 / 7)
