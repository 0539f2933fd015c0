"""Words and sentences of a text, against their definitions."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.diagnostics.split_text import in_lower_case, split_text
from service.diagnostics.word_classes import CLASS_OF, CLASSES, COMMON_WORDS
from service.diagnostics.word_sets import CLASS_MEMBERS, FUNCTION, MEMBERS, MODAL, SECOND_PERSON, codes_of, count

CHARACTERS = "abIS'\u2019.!?\n ,-\t\r\x1c\x85\u00a0\u2003\u00e9\u0130\u212a\u4f60\U0001f600\ud800"


def sizes(parts: list[str]) -> list[int]:
    """Return the words of each part that has any: runs of letters of ASCII and apostrophes."""
    found = [len(re.findall(r"[A-Za-z']+", part.replace("\u2019", "'"))) for part in parts]
    return [size for size in found if size]


@given(st.text(CHARACTERS, max_size=60))
def test_words_and_sentences_are_those_of_their_definitions(text: str) -> None:
    """Words, sentences and spaced sentences are those of regular expressions over the text, whatever its characters."""
    split = split_text(text)

    words = [word.lower().encode() for word in re.findall(r"[A-Za-z']+", text.replace("\u2019", "'"))]
    assert split.words == words
    assert split.sentence_sizes == sizes(re.split(r"[.!?\n]+", text))
    assert split.spaced_sentence_sizes == sizes(re.split(r"(?<=[.!?])\s+|\n+", text))
    assert split.ascii_only == text.encode("ascii", "ignore")
    assert b"".join(split.codes_of(split.sentence_sizes)) == split.codes == codes_of(words)


@pytest.mark.parametrize("text", ["plain text", "\u00fcber", "\u0130stanbul", "30 \u212aelvin"])
def test_words_of_the_text_in_lower_case(text: str) -> None:
    """Two characters have letters of ASCII in lower case; with them the words are others, else they are the same."""
    lowered = in_lower_case(split_text(text))

    assert lowered.words == split_text(text.lower()).words
    assert (lowered.words == split_text(text).words) == text.startswith(("plain", "\u00fcber"))


def test_counts_of_a_set_are_those_of_its_words() -> None:
    """The codes of words tell for each set which of them it has; a word may be in several."""
    words = sorted({*CLASS_OF, *COMMON_WORDS, *FUNCTION, *MODAL, b"egg", b""})
    codes = codes_of(words)

    for name, of in (
        ("modal", MODAL),
        ("function", FUNCTION),
        ("common", COMMON_WORDS),
        ("second_person", SECOND_PERSON),
    ):
        assert count(codes, MEMBERS[name]) == sum(word in of for word in words)
        assert [count(codes[place : place + 1], MEMBERS[name]) == 1 for place in range(len(words))] == [
            word in of for word in words
        ]
    for index in range(len(CLASSES)):
        assert count(codes, CLASS_MEMBERS[index]) == sum(CLASS_OF.get(word) == index for word in words)
