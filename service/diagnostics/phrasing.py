"""How a completion is worded: the statistics that the drift monitor compares, and hashes of its word sequences.

They do not need a model or a calibration, and are computed in the tokenizer's threads. The hashes stay in the process:
they are compared with those of other completions, and never leave it.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Literal, TypeAlias
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.lexicon import StyleMarkers
from service.diagnostics.split_text import SplitText, in_lower_case
from service.diagnostics.word_classes import CLASSES
from service.diagnostics.word_sets import CLASS_MEMBERS, MEMBERS, count

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
_BULLET = re.compile("^[ \t]*[\u2022\u2023\u2043\u25aa\u25cf\u25e6\u2013\u2014\u00b7][ \t]", re.MULTILINE)
"""Bullets beside those of markdown, which `StyleMarkers` counts."""

_LETTERS = string.ascii_lowercase.encode() + b"'"
_BLANK_UNLESS_LETTER = bytes(byte if byte in _LETTERS else 32 for byte in range(256))
_DIGITS, _CAPITALS = string.digits.encode(), string.ascii_uppercase.encode()
_COMMON = MEMBERS["common"]
_SCALES = [(statistic.scale == "log", statistic.limit) for statistic in WORDING[:-1]]
_NOT_OTHER_PUNCTUATION = b".,!?'"
_OTHER_PUNCTUATION = bytes(byte for byte in string.punctuation.encode() if byte not in _NOT_OTHER_PUNCTUATION)
_COMMON_BIT = np.uint8(1 << len(CLASSES))
_BITS_OF_CODE = bytes(
    sum(1 << index for index, members in enumerate(CLASS_MEMBERS) if code in members)
    | (0 if code in _COMMON else int(_COMMON_BIT))
    for code in range(256)
)
"""The class of a word as a bit, and the bit of common words where it is none; a phrase has the bits of its words."""

_MULTIPLIERS = np.array(
    [[0x9E3779B97F4A7C15], [0xC2B2AE3D27D4EB4F], [0x165667B19E3779F9], [0xD6E8FEB86659FD93]], np.uint64
)


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
    split: SplitText,
    prompt_words: AbstractSet[bytes],
    markers: StyleMarkers,
    prompt_hash: int,
    surprisal: float = math.nan,
) -> Wording:
    """Compute the statistics of a completion.

    Args:
        split: the completion.
        prompt_words: words of the prompt, or of its last turn.
        markers: style markers of the completion.
        prompt_hash: identifies the prompt within this process.
        surprisal: mean -ln p of a token given the one before; NaN where it is unknown.
    """
    lowered = in_lower_case(split)
    phrases, kinds = _phrases(lowered)
    values = _values(split, lowered, phrases, markers, prompt_words)
    values.append(surprisal)
    return Wording(np.array(values), phrases, kinds, prompt_hash)


def words_of(text: str) -> frozenset[bytes]:
    """Return the distinct words of a text."""
    return frozenset(text.lower().encode("ascii", "replace").translate(_BLANK_UNLESS_LETTER).split())


def shown(statistic: Statistic, value: float) -> float:
    """Return a mean in the unit of the statistic."""
    return math.expm1(value) if statistic.scale == "log" else value


def _values(
    split: SplitText,
    lowered: SplitText,
    phrases: NDArray[np.uint32],
    markers: StyleMarkers,
    prompt_words: AbstractSet[bytes],
) -> list[float]:
    text, ascii_only, words, codes = split.text, split.ascii_only, lowered.words, lowered.codes
    num_words, num_chars, num_sentences = max(1, len(words)), max(1, len(text)), len(lowered.spaced_sentence_sizes)
    num_foreign = len(text) - len(ascii_only)
    empty = sum(map(_is_empty, lowered.codes_of(lowered.spaced_sentence_sizes)))
    list_items = markers.list_items + (len(_BULLET.findall(text)) if num_foreign else 0)
    distinct = set(words)
    first = words[:_DISTINCT_WINDOW]
    raw = [
        len(words),
        num_sentences,
        len(words) / max(1, num_sentences),
        sum(map(len, words)) / num_words,
        100.0 * len(set(first)) / max(1, len(first)),
        empty,
        100.0 * count(codes, _COMMON) / num_words,
        *(100.0 * count(codes, members) / num_words for members in CLASS_MEMBERS),
        text.count("?"),
        text.count("!"),
        list_items,
        100.0 * (list_items > 0),
        markers.headers + markers.bold,
        text.strip().count("\n"),
        100.0 * text.count(",") / num_words,
        100.0 * count(ascii_only, _OTHER_PUNCTUATION) / num_words,
        100.0 * count(ascii_only, _DIGITS) / num_chars,
        100.0 * count(ascii_only, _CAPITALS) / num_chars,
        100.0 * (num_foreign - text.count("\u2019") if num_foreign else 0) / num_chars,
        100.0 * len(distinct & prompt_words) / max(1, len(distinct)),
        100.0 * (1.0 - len(set(phrases.tolist())) / len(phrases)) if len(phrases) else 0.0,
    ]
    return [
        math.log1p(value) if is_log else min(value, limit) for value, (is_log, limit) in zip(raw, _SCALES, strict=True)
    ]


def _is_empty(codes: bytes) -> bool:
    """Whether a sentence has common words alone, or hardly others."""
    return len(codes) >= _MIN_SENTENCE_WORDS and count(codes, _COMMON) >= len(codes) - len(codes) // 10


def _phrases(split: SplitText) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """Return the hash of each phrase, and the kinds that it is of."""
    words = split.words[: MAX_PHRASES + PHRASE_WORDS - 1]
    num = len(words) - PHRASE_WORDS + 1
    if num <= 0:
        return np.empty(0, np.uint32), np.empty(0, np.uint8)
    hashes = _MULTIPLIERS * np.fromiter(map(crc32, words), np.uint64, len(words))
    bits = np.frombuffer(split.codes[: len(words)].translate(_BITS_OF_CODE), np.uint8)
    phrases, kinds = hashes[0, :num], bits[:num]
    for offset in range(1, PHRASE_WORDS):
        phrases = phrases + hashes[offset, offset : offset + num]
        kinds = kinds | bits[offset : offset + num]
    return (phrases >> np.uint64(64 - PHRASE_BITS)).astype(np.uint32), kinds ^ _COMMON_BIT
