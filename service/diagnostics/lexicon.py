"""The style markers that are counted in a completion: markdown, emoji, hedging and flattering phrases.

English phrases only, and plain patterns: a count of zero means that nothing on this list was found. A calibration is
bound to ``LEXICON_VERSION``, so every change that alters a count must change the version; so must every change of the
text statistics of ``text``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

StyleKind: TypeAlias = Literal["headers", "list_items", "bold", "emoji", "hedges", "flattery"]

LEXICON_VERSION = "2"

FENCED_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_HEADER = re.compile(r"^ {0,3}#{1,6}[ \t]", re.MULTILINE)
_LIST_ITEM = re.compile(r"^[ \t]*(?:[-*+]|\d+[.)])[ \t]", re.MULTILINE)
_BOLD = re.compile(r"\*\*(?:(?!\*\*)[^\n])+\*\*|__(?:(?!__)[^\n])+__")
_EMOJI = re.compile("[\U0001f300-\U0001faff\u2600-\u27bf]")

# A pattern is searched only in texts that contain one of its words: `in` is much faster than a regular expression.
_HEDGES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("to note", "to consider", "noting", "considering"),
        r"it(?: is|'s) (?:important|worth) (?:to )?(?:not|consider)\w*",
    ),
    (("may be",), r"it may be|may be worth"),
    (("might be",), r"might be"),
    (("argu",), r"could be argued|arguably"),
    (("generally speaking",), r"generally speaking"),
    (("possib",), r"it is possible|possibly"),
    (("perhaps",), r"perhaps"),
    (("sure", "certain"), r"i(?:'m| am) not (?:entirely )?(?:sure|certain)|not entirely certain"),
    (("as an ai",), r"as an ai"),
    (("i would suggest",), r"i would suggest"),
    (("please consult",), r"please consult"),
    (("in some cases",), r"in some cases"),
    (("it depends",), r"it depends"),
    (("to some extent",), r"to some extent"),
    (("i cannot guarantee",), r"i cannot guarantee"),
    (("seem", "appear"), r"(?:seem|appear)s? to"),
    (("likely",), r"likely"),
)
_FLATTERY: tuple[tuple[tuple[str, ...], str], ...] = (
    ((" question",), r"(?:great|excellent|insightful) question"),
    (("brilliant",), r"brilliant"),
    (("hope th",), r"hope (?:this|that) helps"),
    (("happy to help",), r"happy to help"),
    (("hesitate",), r"don't hesitate"),
    (("feel free to ask",), r"feel free to ask"),
    (("you are ", "you're "), r"you(?: are|'re) (?:amazing|absolutely right|clearly)"),
)


@dataclass(frozen=True, slots=True)
class StyleMarkers:
    """Number of occurrences of each style marker in a text."""

    headers: int
    list_items: int
    bold: int
    emoji: int
    hedges: int
    flattery: int


@dataclass(frozen=True, slots=True)
class StyleSpan:
    """One occurrence of a style marker."""

    kind: StyleKind

    start: int
    """First character of the text that belongs to it; characters are Unicode code points."""

    end: int
    """The character after its last one."""


class _Phrases:
    """Phrases of one kind, matched as whole words in any case, with the words that every match contains."""

    def __init__(self, phrases: tuple[tuple[tuple[str, ...], str], ...]) -> None:
        patterns = [(words, re.compile(rf"\b(?:{pattern})\b")) for words, pattern in phrases]
        self._by_word = [(word, pattern) for words, pattern in patterns for word in words]

    def count_in(self, lowered: str) -> int:
        return sum([len(pattern.findall(lowered)) for pattern in self._candidates(lowered)])

    def find_in(self, lowered: str) -> Iterator[re.Match[str]]:
        for pattern in self._candidates(lowered):
            yield from pattern.finditer(lowered)

    def _candidates(self, lowered: str) -> set[re.Pattern[str]]:
        return {pattern for word, pattern in self._by_word if word in lowered}


_hedges = _Phrases(_HEDGES)
_flattery = _Phrases(_FLATTERY)


def count_style_markers(text: str) -> StyleMarkers:
    """Count the style markers of a text. Markdown inside fenced code blocks does not count."""
    prose = FENCED_CODE.sub("", text) if "```" in text else text
    lowered = _lowered(text)
    return StyleMarkers(
        headers=len(_HEADER.findall(prose)) if "#" in prose else 0,
        list_items=len(_LIST_ITEM.findall(prose)) if "\n" in prose else int(_LIST_ITEM.match(prose) is not None),
        bold=len(_BOLD.findall(prose)) if "**" in prose or "__" in prose else 0,
        emoji=0 if text.isascii() else len(_EMOJI.findall(text)),
        hedges=_hedges.count_in(lowered),
        flattery=_flattery.count_in(lowered),
    )


def find_style_markers(text: str) -> list[StyleSpan]:
    """Return each marker that `count_style_markers` counts, in the order of the text."""
    prose, prose_origin = _prose_of(text)
    lowered = _lowered(text)
    origin: Sequence[int] = range(len(text))
    if len(lowered) != len(text):  # a character of some alphabets has two in lower case
        origin = [index for index, character in enumerate(text) for _ in character.lower()]
    found = [
        *_spans("headers", _HEADER.finditer(prose), prose_origin),
        *_spans("list_items", _LIST_ITEM.finditer(prose), prose_origin),
        *_spans("bold", _BOLD.finditer(prose), prose_origin),
        *_spans("emoji", _EMOJI.finditer(text), range(len(text))),
        *_spans("hedges", _hedges.find_in(lowered), origin),
        *_spans("flattery", _flattery.find_in(lowered), origin),
    ]
    return sorted(found, key=lambda span: (span.start, span.end))


def _lowered(text: str) -> str:
    return text.lower().replace("\u2019", "'")


def _prose_of(text: str) -> tuple[str, Sequence[int]]:
    """Return the text without fenced code, and the index in the text of each of its characters."""
    if "```" not in text:
        return text, range(len(text))
    origin: list[int] = []
    end = 0
    for code in FENCED_CODE.finditer(text):
        origin += range(end, code.start())
        end = code.end()
    origin += range(end, len(text))
    return FENCED_CODE.sub("", text), origin


def _spans(kind: StyleKind, matches: Iterator[re.Match[str]], origin: Sequence[int]) -> Iterator[StyleSpan]:
    """Turn matches into spans of the text; no pattern matches an empty string."""
    return (StyleSpan(kind, origin[match.start()], origin[match.end() - 1] + 1) for match in matches)
