"""How a completion is worded: the statistics that the drift monitor compares, and hashes of its word sequences.

They do not need a model or a calibration, and are computed in the tokenizer's threads. The hashes stay in the process:
they are compared with those of other completions, and never leave it.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Literal, TypeAlias
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.lexicon import StyleMarkers
from service.diagnostics.word_classes import CLASS_OF, CLASSES, COMMON_WORDS

Scale: TypeAlias = Literal["plain", "log"]


@dataclass(frozen=True, slots=True)
class Statistic:
    """One statistic of a completion's wording."""

    name: str

    unit: str
    """Completes a sentence such as: hedging words 0.4 -> 2.1 per 100 words."""

    limit: float = math.inf
    """Larger values count as this one, so that no single completion decides a mean."""

    scale: Scale = "plain"
    """``log``: ln(1 + x) is averaged, and x is shown."""

    scarce: float = 0.5
    """A deviation that one completion may well have. The variance of a sample includes one more of this size, so that a
    statistic that has not varied yet may begin to."""


_PER_100 = "per 100 words"
_EACH = "per answer"
_OF_CHARACTERS = "percent of the characters"

WORDING: tuple[Statistic, ...] = (
    Statistic("words", _EACH, scale="log"),
    Statistic("sentences", _EACH, scale="log"),
    Statistic("sentence_length", "words", scale="log"),
    Statistic("word_length", "letters", 12.0),
    Statistic("distinct_words", "percent of the first 100 words", scarce=5.0),
    Statistic("common_word_sentences", _EACH, 6.0, scarce=1.0),
    Statistic("common_words", "percent of the words", scarce=5.0),
    *(Statistic(f"{name}_words", _PER_100, 25.0, scarce=2.0) for name in CLASSES),
    Statistic("question_marks", _EACH, 6.0, scarce=1.0),
    Statistic("exclamation_marks", _EACH, 6.0, scarce=1.0),
    Statistic("list_items", _EACH, 12.0, scarce=3.0),
    Statistic("answers_with_lists", "percent", scarce=100.0),
    Statistic("headers_and_bold", _EACH, 12.0, scarce=2.0),
    Statistic("line_breaks", _EACH, scale="log"),
    Statistic("commas", _PER_100, 25.0, scarce=2.0),
    Statistic("other_punctuation", _PER_100, 40.0, scarce=2.0),
    Statistic("digits", _OF_CHARACTERS, 25.0, scarce=1.0),
    Statistic("capitals", _OF_CHARACTERS, 30.0, scarce=1.0),
    Statistic("non_ascii", _OF_CHARACTERS, 25.0, scarce=1.0),
    Statistic("prompt_words", "percent of the distinct words", scarce=5.0),
    Statistic("repeated_phrases", "percent of the answer's phrases", 60.0, scarce=2.0),
    Statistic("token_surprisal", "nats"),
)
"""What is computed of each completion, in this order."""

PHRASE_KINDS: tuple[str, ...] = (*(f"with_{name}_words" for name in CLASSES), "of_common_words")
"""What a phrase may be: have a word of a class, or common words alone."""

PHRASE_WORDS = 4
"""Adjacent words of a phrase."""

MAX_PHRASES = 256
"""Leading phrases of a completion that are hashed."""

PHRASE_BITS = 20
"""Bits of a phrase's hash."""

VERSION = "1"
"""Of the definitions of the statistics: figures of another version are not comparable."""

_DISTINCT_WINDOW = 100
_MIN_SENTENCE_WORDS = 3
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_BULLET = re.compile("^[ \t]*[\u2022\u2023\u2043\u25aa\u25cf\u25e6\u2013\u2014\u00b7][ \t]", re.MULTILINE)
"""Bullets beside those of markdown, which `StyleMarkers` counts."""

_LETTERS = string.ascii_lowercase.encode() + b"'"
_BLANK_UNLESS_LETTER = bytes(byte if byte in _LETTERS else 32 for byte in range(256))
_NOT_OTHER_PUNCTUATION = b".,!?'"
_OTHER_PUNCTUATION = bytes(byte for byte in string.punctuation.encode() if byte not in _NOT_OTHER_PUNCTUATION)
_COMMON_BIT = np.uint8(1 << len(CLASSES))
_BITS_OF = {
    word: (1 << CLASS_OF[word] if word in CLASS_OF else 0) | (int(_COMMON_BIT) if word in COMMON_WORDS else 0)
    for word in {*CLASS_OF, *COMMON_WORDS}
}
_MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64)


@dataclass(frozen=True, slots=True, eq=False)
class Wording:
    """How one completion is worded."""

    values: NDArray[np.float64] = field(repr=False)
    """The statistics of `WORDING`, on the scale on which they are averaged; NaN where one is unknown."""

    phrases: NDArray[np.uint32] = field(repr=False)
    """Hashes of its phrases, below 2 ** `PHRASE_BITS`, in the order of the text, uint32 [phrases]."""

    kinds: NDArray[np.uint8] = field(repr=False)
    """For each phrase a bit for each of `PHRASE_KINDS` that it is of, uint8 [phrases]."""

    prompt: int
    """Hash of the prompt, equal for equal prompts within a process."""


def read_wording(
    text: str, prompt: str, markers: StyleMarkers, prompt_hash: int, surprisal: float = math.nan
) -> Wording:
    """Compute the statistics of a completion.

    Args:
        text: the completion.
        prompt: text of the prompt, or its last turn.
        markers: style markers of the completion.
        prompt_hash: identifies the prompt within this process.
        surprisal: mean -ln p of a token given the one before; NaN where it is unknown.
    """
    plain = text.replace("\u2019", "'")
    lowered = plain.lower()
    sentences = [sentence for part in _SENTENCE_END.split(lowered) if (sentence := _words(part))]
    words = list(chain.from_iterable(sentences))
    phrases, kinds = _phrases(words[: MAX_PHRASES + PHRASE_WORDS - 1])
    values = _values(plain, sentences, words, phrases, markers, set(_words(prompt.lower())))
    values.append(surprisal)
    return Wording(np.array(values), phrases, kinds, prompt_hash)


def shown(statistic: Statistic, value: float) -> float:
    """Return a mean in the unit of the statistic."""
    return math.expm1(value) if statistic.scale == "log" else value


def _values(
    plain: str,
    sentences: list[list[bytes]],
    words: list[bytes],
    phrases: NDArray[np.uint32],
    markers: StyleMarkers,
    prompt_words: set[bytes],
) -> list[float]:
    num_words, num_chars = max(1, len(words)), max(1, len(plain))
    ascii_text = plain.encode("ascii", "ignore")
    classes = Counter(map(CLASS_OF.get, words))
    common = [sum(map(COMMON_WORDS.__contains__, sentence)) for sentence in sentences]
    empty = sum(
        len(sentence) >= _MIN_SENTENCE_WORDS and known >= len(sentence) - len(sentence) // 10
        for sentence, known in zip(sentences, common, strict=True)
    )
    list_items = markers.list_items + (0 if len(ascii_text) == len(plain) else len(_BULLET.findall(plain)))
    distinct = set(words)
    first = words[:_DISTINCT_WINDOW]
    raw = [
        len(words),
        len(sentences),
        len(words) / max(1, len(sentences)),
        sum(map(len, words)) / num_words,
        100.0 * len(set(first)) / max(1, len(first)),
        empty,
        100.0 * sum(common) / num_words,
        *(100.0 * classes[index] / num_words for index in range(len(CLASSES))),
        plain.count("?"),
        plain.count("!"),
        list_items,
        100.0 * (list_items > 0),
        markers.headers + markers.bold,
        plain.strip().count("\n"),
        100.0 * plain.count(",") / num_words,
        100.0 * _count(ascii_text, _OTHER_PUNCTUATION) / num_words,
        100.0 * _count(ascii_text, string.digits.encode()) / num_chars,
        100.0 * _count(ascii_text, string.ascii_uppercase.encode()) / num_chars,
        100.0 * (len(plain) - len(ascii_text)) / num_chars,
        100.0 * len(distinct & prompt_words) / max(1, len(distinct)),
        100.0 * (1.0 - len(np.unique(phrases)) / len(phrases)) if len(phrases) else 0.0,
    ]
    return [
        math.log1p(value) if statistic.scale == "log" else min(value, statistic.limit)
        for value, statistic in zip(raw, WORDING[:-1], strict=True)
    ]


def _words(lowered: str) -> list[bytes]:
    return lowered.encode("ascii", "replace").translate(_BLANK_UNLESS_LETTER).split()


def _phrases(words: list[bytes]) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """Return the hash of each phrase, and the kinds that it is of."""
    num = len(words) - PHRASE_WORDS + 1
    if num <= 0:
        return np.empty(0, np.uint32), np.empty(0, np.uint8)
    codes = np.fromiter(map(crc32, words), np.uint64, len(words))
    bits = np.fromiter(map(_BITS_OF.get, words, repeat(0)), np.uint8, len(words))
    hashes, any_of, all_of = np.zeros(num, np.uint64), np.zeros(num, np.uint8), np.full(num, _COMMON_BIT)
    for offset in range(PHRASE_WORDS):
        own = slice(offset, offset + num)
        hashes += codes[own] * _MULTIPLIERS[offset]
        any_of |= bits[own]
        all_of &= bits[own]
    kinds = (any_of & ~_COMMON_BIT) | all_of
    return (hashes >> np.uint64(64 - PHRASE_BITS)).astype(np.uint32), kinds


def _count(text: bytes, characters: bytes) -> int:
    return len(text) - len(text.translate(None, characters))
