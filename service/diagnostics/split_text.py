"""The words of a text, split once for all statistics that read them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain

from service.diagnostics.word_sets import codes_of


def _table(stops: bytes) -> bytes:
    """Return the bytes that replace all bytes: letters in lower case, line breaks for the stops, else blanks."""
    found = bytearray(b" " * 256)
    for letter in b"abcdefghijklmnopqrstuvwxyz'":
        found[letter] = letter
        found[bytes([letter]).upper()[0]] = letter
    for stop in stops:
        found[stop] = ord("\n")
    return bytes(found)


_BY_STOP, _BY_LINE = _table(b".!?\n"), _table(b"\n")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_FOREIGN_BLANK = re.compile(r"[^\S\x00-\x7f]+")
_FOREIGN = re.compile(r"[^\x00-\x7f]+")
_ASCII_IN_LOWER_CASE = ("\u0130", "\u212a")
"""The characters outside ASCII whose lower case has a letter of ASCII."""


@dataclass(frozen=True, slots=True)
class SplitText:
    """A text and its words: runs of ASCII letters and apostrophes, in lower case."""

    text: str = field(repr=False)

    ascii_only: bytes = field(repr=False)
    """The text without its characters outside ASCII."""

    words: Sequence[bytes] = field(repr=False)

    codes: bytes = field(repr=False)
    """The code of each word (``word_sets``)."""

    sentence_sizes: Sequence[int]
    """Words of each part between full stops, question and exclamation marks and line ends, at least one."""

    spaced_sentence_sizes: Sequence[int]
    """Words of each part between lines, and such marks that a blank follows: "3.5 km" is in one part; at least one."""

    def codes_of(self, sizes: Sequence[int]) -> list[bytes]:
        """Return the codes of the words of each part."""
        return [self.codes[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]


def split_text(text: str) -> SplitText:
    """Split a text."""
    ascii_only = text.encode("ascii", "ignore")
    plain = text
    if len(ascii_only) < len(text):
        plain = _FOREIGN.sub("#", _FOREIGN_BLANK.sub(" ", text.replace("\u2019", "'")))
    sentences = list(filter(None, map(bytes.split, plain.encode().translate(_BY_STOP).split(b"\n"))))
    words = list(chain.from_iterable(sentences))
    by_line = _SENTENCE_END.sub("\n", plain).encode().translate(_BY_LINE).split(b"\n")
    spaced = list(filter(None, map(len, map(bytes.split, by_line))))
    return SplitText(text, ascii_only, words, codes_of(words), list(map(len, sentences)), spaced)


def in_lower_case(split: SplitText) -> SplitText:
    """Return the split of a text whose words are read after it was put into lower case.

    Only two characters make a difference.
    """
    text = split.text
    if len(split.ascii_only) == len(text) or not any(character in text for character in _ASCII_IN_LOWER_CASE):
        return split
    return split_text(text.lower())
