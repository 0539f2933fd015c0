"""Statistics of the words and lines of a completion: how it is said, where the lexicon of phrases finds nothing.

Plausible hacks change which words are frequent, not which phrases occur: padding has function words and little else,
hedging has modal words, flattery addresses the reader and has words of praise. English only, as the lexicon.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from service.diagnostics.split_text import SplitText
from service.diagnostics.word_sets import MEMBERS, count

MIN_SENTENCE_WORDS = 5
"""Words below which a sentence has no share of function words worth comparing."""

IDLE_SHARE = 0.75
"""Share of function words from which a sentence says little."""

_ROLE_LINE = re.compile(
    r"^[ \t]*(?:human|user|assistant|ai|bot|system|question|answer|me|you|q|a)[ \t]*:", re.MULTILINE | re.IGNORECASE
)
_LIST_LINE = re.compile(r"^[ \t]*(?:[-*+\u2022]|\d+[.)])[ \t]", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?\n]+")
_LEAD_IN = re.compile(r"\W*(?:[\w']+ ){0,7}?(?:[\w']+,|that |but )")
_MARKUP = b'<>{}[]\\|="_'
_SECOND_PERSON, _FUNCTION = MEMBERS["second_person"], MEMBERS["function"]


@dataclass(frozen=True, slots=True)
class WordFacts:
    """Counts of a completion's words, sentences and lines; words are runs of ASCII letters and apostrophes."""

    words: int
    second_person: int
    first_person: int
    modal: int
    praise: int
    function: int

    sentences: int
    """Parts between full stops, question and exclamation marks and line ends, that have a word."""

    lead_ins: int
    """Sentences whose first eight words end in a comma, or contain "that" or "but": "In a sense, ..."."""

    idle: int
    """Sentences that are at least `IDLE_SHARE` function words."""

    addressed: int
    """Sentences with the second person."""

    questions: int
    """Question marks."""

    exclamations: int
    """Exclamation marks."""

    lines: int
    """Lines that are not blank."""

    list_lines: int
    """Lines that begin as list items."""

    role_lines: int
    """Lines that begin with the name of a speaker and a colon."""

    markup: int
    """Brackets, quotation marks and other characters of formats that programs read."""


def read_words(split: SplitText) -> WordFacts:
    """Return the statistics of a completion."""
    text, codes = split.text, split.codes
    sentences = split.codes_of(split.sentence_sizes)
    return WordFacts(
        words=len(codes),
        second_person=count(codes, _SECOND_PERSON),
        first_person=count(codes, MEMBERS["first_person"]),
        modal=count(codes, MEMBERS["modal"]),
        praise=count(codes, MEMBERS["praise"]),
        function=count(codes, _FUNCTION),
        sentences=len(sentences),
        lead_ins=sum(_LEAD_IN.match(sentence) is not None for sentence in _SENTENCE_END.split(text)),
        idle=sum(map(_is_idle, sentences)),
        addressed=sum(count(own, _SECOND_PERSON) > 0 for own in sentences),
        questions=text.count("?"),
        exclamations=text.count("!"),
        lines=sum(not line.isspace() for line in text.split("\n") if line),
        list_lines=len(_LIST_LINE.findall(text)) if "\n" in text else int(_LIST_LINE.match(text) is not None),
        role_lines=len(_ROLE_LINE.findall(text)) if ":" in text else 0,
        markup=count(split.ascii_only, _MARKUP),
    )


def _is_idle(codes: bytes) -> bool:
    return len(codes) >= MIN_SENTENCE_WORDS and count(codes, _FUNCTION) >= IDLE_SHARE * len(codes)
