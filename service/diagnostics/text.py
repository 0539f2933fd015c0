"""Statistics of a completion's characters and token ids, computed without the model.

The statistics that reward hacks change, and the counts of the style block. They are computed in the
tokenizer's threads, so the work is done by built-ins that are implemented in C. Which values are unusual is decided by
the detectors.
"""

from __future__ import annotations

import math
import string
import zlib
from collections import Counter
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.lexicon import FENCED_CODE, StyleMarkers, count_style_markers
from service.diagnostics.ngrams import WINDOW_TOKENS, NgramCounts, Surprisal
from service.diagnostics.phrasing import Wording, read_wording
from service.diagnostics.wording import WordFacts, read_words
from service.records import Exchange, Item, StyleReport, TokenSequence

STATISTICS = (
    "logtok",
    "zratio",
    "rep4",
    "top4",
    "ttr",
    "uni",
    "bi",
    "nonascii",
    "punct",
    "wlen",
    "digit",
    "upper",
    "md",
    "emoji",
    "hedge",
    "flattery",
    "overlap",
    "chars_tok",
    "uni_peak",
    "bi_peak",
    "uni_dip",
    "copy3",
    "second",
    "first",
    "modal",
    "praise",
    "function",
    "idle",
    "lead",
    "addressed",
    "sentence",
    "question",
    "exclaim",
    "lines",
    "listed",
    "roles",
    "markup",
)
"""Names of the text statistics, in the order of the vectors. A change of them must change
`LEXICON_VERSION`, which calibrations are bound to."""

ZLIB_CHARS = 6000
"""Leading characters that are compressed; repetition is visible within them."""

MIN_ZLIB_BYTES = 40
SHORT_ZLIB_RATIO = 0.9
"""The ratio assigned to a text below `MIN_ZLIB_BYTES`, whose compressed form would be mostly header."""

TYPE_TOKEN_WINDOW = 100
MIN_FOUR_GRAMS = 20

_LETTERS = string.ascii_letters.encode() + b"'"
_PUNCTUATION = string.punctuation.encode()
_DIGITS = string.digits.encode()
_UPPER = string.ascii_uppercase.encode()
_BLANK_UNLESS_LETTER = bytes(byte if byte in _LETTERS else 32 for byte in range(256))


@dataclass(frozen=True, slots=True)
class CharFacts:
    """Statistics of the characters of a completion; counts unless noted."""

    chars: int
    words: int
    """Whitespace-separated words outside of fenced code blocks."""

    non_ascii: int
    punctuation: int
    digits: int
    upper: int
    word_length: float
    """Mean length of runs of ASCII letters, in letters."""

    zlib_ratio: float
    """Compressed size over uncompressed size, see `zlib_ratio`."""

    markers: StyleMarkers


@dataclass(frozen=True, slots=True)
class TokenFacts:
    """Statistics of the first `WINDOW_TOKENS` token ids of a completion."""

    repeat4: float
    """Share of 4-grams that occurred before in the completion."""

    top4: float
    """Share of the most frequent 4-gram; 0 for `MIN_FOUR_GRAMS` 4-grams or fewer."""

    type_token: float
    """Distinct tokens over tokens, within the first `TYPE_TOKEN_WINDOW` tokens (type-token ratio)."""

    overlap: float
    """Share of tokens that also occur in the prompt."""

    copied: float
    """Share of 3-grams that also occur in the last `WINDOW_TOKENS` of the prompt."""


@dataclass(frozen=True, slots=True)
class TextFacts:
    """Everything that was computed from the text of one completion."""

    chars: CharFacts
    tokens: TokenFacts | None = None
    """None below level ``full``."""

    statistics: NDArray[np.float64] | None = None
    """The numbers named in `STATISTICS`, float64; None below level ``full`` and without n-gram counts."""

    wording: Wording | None = field(default=None, repr=False)
    """What the drift monitor compares; `TextReader` always computes it."""


class TextReader:
    """Computes the text statistics of items.

    Args:
        ngrams: n-gram counts of the calibration; None: counts are computed, statistics are not.
        special_ids: ids of the tokenizer's special tokens, at which a completion's own tokens end.
    """

    def __init__(self, ngrams: NgramCounts | None, special_ids: AbstractSet[int] = frozenset()) -> None:
        self._ngrams = ngrams
        self._special_ids = special_ids

    def read(self, item: Item, sequence: TokenSequence, *, full: bool) -> TextFacts | None:
        """Return the statistics of the completion; None where prompt and completion cannot be separated.

        Args:
            item: as the caller sent it.
            sequence: the same item, tokenized.
            full: whether to compute token statistics and the vector of statistics too.
        """
        content = item.content
        if not isinstance(content, Exchange) or sequence.num_prompt_tokens is None:
            return None
        chars = read_chars(content.completion_text)
        if not full:
            return TextFacts(chars, wording=wording_of(content, chars))
        num_prompt = sequence.num_prompt_tokens
        completion = completion_tokens(sequence.token_ids[num_prompt:], self._special_ids)
        tokens = read_tokens(completion, sequence.token_ids[:num_prompt])
        if self._ngrams is None:
            return TextFacts(chars, tokens, wording=wording_of(content, chars))
        surprisal = self._ngrams.surprisals(completion)
        words = read_words(content.completion_text)
        statistics = statistics_of(chars, tokens, words, surprisal, sequence.num_tokens - num_prompt)
        return TextFacts(chars, tokens, statistics, wording_of(content, chars, surprisal.bi))


def read_chars(text: str) -> CharFacts:
    """Return the character statistics of a completion."""
    ascii_only = text.encode("ascii", "ignore")
    letters = text.encode("ascii", "replace").translate(_BLANK_UNLESS_LETTER)
    num_runs = len(letters.split())
    prose = FENCED_CODE.sub("", text) if "```" in text else text
    return CharFacts(
        chars=len(text),
        words=len(prose.split()),
        non_ascii=len(text) - len(ascii_only),
        punctuation=_count(ascii_only, _PUNCTUATION),
        digits=_count(ascii_only, _DIGITS),
        upper=_count(ascii_only, _UPPER),
        word_length=_count(ascii_only, _LETTERS) / num_runs if num_runs else 0.0,
        zlib_ratio=zlib_ratio(text),
        markers=count_style_markers(text),
    )


def zlib_ratio(text: str) -> float:
    """Return compressed over uncompressed size (zlib level 1) of the first `ZLIB_CHARS`; low for repetitive text."""
    raw = text[:ZLIB_CHARS].encode("utf-8", "surrogatepass")
    return len(zlib.compress(raw, 1)) / len(raw) if len(raw) >= MIN_ZLIB_BYTES else SHORT_ZLIB_RATIO


def completion_tokens(ids: tuple[int, ...], special_ids: AbstractSet[int]) -> tuple[int, ...]:
    """Remove what the chat template appends to a completion: its closing special token and the whitespace after it."""
    for end in range(len(ids) - 1, max(-1, len(ids) - 4), -1):
        if ids[end] in special_ids:
            return ids[:end]
    return ids


def read_tokens(completion: tuple[int, ...], prompt: tuple[int, ...]) -> TokenFacts:
    """Return the token statistics of a completion."""
    ids = completion[:WINDOW_TOKENS]
    if not ids:
        return TokenFacts(0.0, 0.0, 0.0, 0.0, 0.0)
    four_grams = Counter(zip(ids, ids[1:], ids[2:], ids[3:], strict=False))
    num_four_grams = max(0, len(ids) - 3)
    first = ids[:TYPE_TOKEN_WINDOW]
    return TokenFacts(
        repeat4=1 - len(four_grams) / num_four_grams if num_four_grams else 0.0,
        top4=max(four_grams.values()) / num_four_grams if num_four_grams > MIN_FOUR_GRAMS else 0.0,
        type_token=len(set(first)) / len(first),
        overlap=sum(map(set(prompt).__contains__, ids)) / len(ids),
        copied=_share_copied(ids, prompt[-WINDOW_TOKENS:]),
    )


def _share_copied(ids: tuple[int, ...], prompt: tuple[int, ...]) -> float:
    if len(ids) < 3:
        return 0.0
    known = set(zip(prompt, prompt[1:], prompt[2:], strict=False))
    return sum(map(known.__contains__, zip(ids, ids[1:], ids[2:], strict=False))) / (len(ids) - 2)


def statistics_of(
    chars: CharFacts, tokens: TokenFacts, words: WordFacts, surprisal: Surprisal, num_completion_tokens: int
) -> NDArray[np.float64]:
    """Return the statistics named in `STATISTICS`, float64."""
    markers = chars.markers
    return np.array(
        [
            math.log1p(num_completion_tokens),
            chars.zlib_ratio,
            tokens.repeat4,
            tokens.top4,
            tokens.type_token,
            surprisal.uni,
            surprisal.bi,
            _per_100(chars.non_ascii, chars.chars),
            _per_100(chars.punctuation, chars.chars),
            chars.word_length,
            _per_100(chars.digits, chars.chars),
            _per_100(chars.upper, chars.chars),
            _per_100(markers.headers + markers.list_items + markers.bold, chars.words),
            _per_100(markers.emoji, chars.words),
            _per_100(markers.hedges, chars.words),
            _per_100(markers.flattery, chars.words),
            tokens.overlap,
            chars.chars / max(1, num_completion_tokens),
            surprisal.uni_peak,
            surprisal.bi_peak,
            surprisal.uni_dip,
            tokens.copied,
            _per_100(words.second_person, words.words),
            _per_100(words.first_person, words.words),
            _per_100(words.modal, words.words),
            _per_100(words.praise, words.words),
            words.function / max(1, words.words),
            words.idle / max(1, words.sentences),
            words.lead_ins / max(1, words.sentences),
            words.addressed / max(1, words.sentences),
            math.log1p(words.words / max(1, words.sentences)),
            _per_100(words.questions, words.words),
            _per_100(words.exclamations, words.words),
            _per_100(words.lines, words.words),
            words.list_lines / max(1, words.lines),
            _per_100(words.role_lines, words.words),
            _per_100(words.markup, chars.chars),
        ]
    )


def wording_of(content: Exchange, chars: CharFacts, surprisal: float = math.nan) -> Wording:
    """Return how a completion is worded, compared with the last turn of its prompt."""
    prompt = content.prompt
    question = prompt if isinstance(prompt, str) else prompt[-1].text
    return read_wording(content.completion_text, question, chars.markers, hash((prompt, content.tools)), surprisal)


def style_report(facts: TextFacts, style_p: float | None = None) -> StyleReport:
    """Return the style block; the fractions are None where token statistics were not computed."""
    chars, tokens, markers = facts.chars, facts.tokens, facts.chars.markers
    return StyleReport(
        headers=markers.headers,
        list_items=markers.list_items,
        bold=markers.bold,
        emoji=markers.emoji,
        hedges=markers.hedges,
        flattery=markers.flattery,
        words=chars.words,
        repeat4=None if tokens is None else tokens.repeat4,
        zlib_ratio=None if tokens is None else chars.zlib_ratio,
        non_ascii=None if tokens is None else chars.non_ascii / max(1, chars.chars),
        prompt_overlap=None if tokens is None else tokens.overlap,
        style_p=style_p,
    )


def _count(text: bytes, characters: bytes) -> int:
    return len(text) - len(text.translate(None, characters))


def _per_100(count: int, total: int) -> float:
    return math.log1p(100 * count / max(1, total))
