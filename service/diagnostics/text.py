"""What can be said of a completion by looking at its characters and token ids, without the model.

Eighteen statistics that crude reward hacks move, and the counts that people want to see. They are computed in the
tokenizer's threads, so everything here leans on what Python does in C; nothing here knows what is unusual.
"""

from __future__ import annotations

import math
import string
import zlib
from collections import Counter
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.lexicon import FENCED_CODE, Tells, count_tells
from service.diagnostics.ngrams import WINDOW_TOKENS, NgramCounts
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
)
"""Names of the text statistics, in the order of the vectors."""

ZLIB_CHARS = 6000
"""Characters that are compressed: what repeats shows itself early."""

MIN_ZLIB_BYTES = 40
SHORT_ZLIB_RATIO = 0.9
"""What a text below `MIN_ZLIB_BYTES` counts as: its header alone would be most of the result."""

TYPE_TOKEN_WINDOW = 100
MIN_FOUR_GRAMS = 20

_LETTERS = string.ascii_letters.encode() + b"'"
_PUNCTUATION = string.punctuation.encode()
_DIGITS = string.digits.encode()
_UPPER = string.ascii_uppercase.encode()
_BLANK_UNLESS_LETTER = bytes(byte if byte in _LETTERS else 32 for byte in range(256))


@dataclass(frozen=True, slots=True)
class CharFacts:
    """What the characters of a completion say. Counts, except the ratio and ``word_length`` (mean, in letters)."""

    chars: int
    words: int
    non_ascii: int
    punctuation: int
    digits: int
    upper: int
    word_length: float
    zlib_ratio: float
    tells: Tells


@dataclass(frozen=True, slots=True)
class TokenFacts:
    """What the token ids of a completion say.

    ``repeat4``: share of 4-grams that occurred before. ``top4``: share of the most frequent one. ``type_token``:
    distinct tokens per token at the beginning. ``overlap``: share of tokens that the prompt has too.
    """

    repeat4: float
    top4: float
    type_token: float
    overlap: float


@dataclass(frozen=True, slots=True)
class TextFacts:
    """All that is known of one completion as a text. ``statistics``: float64 [18], None below level ``full``."""

    chars: CharFacts
    tokens: TokenFacts | None = None
    statistics: NDArray[np.float64] | None = None


class TextReader:
    """Reads the texts of items.

    Args:
        ngrams: n-gram counts of the calibration; without them there are counts, but no statistics.
        special_ids: the tokenizer's special tokens, which end a completion's own tokens.
    """

    def __init__(self, ngrams: NgramCounts | None, special_ids: AbstractSet[int] = frozenset()) -> None:
        self._ngrams = ngrams
        self._special_ids = special_ids

    def read(self, item: Item, sequence: TokenSequence, *, full: bool) -> TextFacts | None:
        """Return what the completion's text says; None where the completion is not known as a text.

        Args:
            item: as the caller sent it.
            sequence: the same, tokenized.
            full: whether to look at tokens and compute the statistics too.
        """
        content = item.content
        if not isinstance(content, Exchange) or sequence.num_prompt_tokens is None:
            return None
        chars = read_chars(content.completion)
        if not full:
            return TextFacts(chars)
        border = sequence.num_prompt_tokens
        completion = completion_tokens(sequence.token_ids[border:], self._special_ids)
        tokens = read_tokens(completion, sequence.token_ids[:border])
        if self._ngrams is None:
            return TextFacts(chars, tokens)
        uni, bi = self._ngrams.surprisal(completion)
        return TextFacts(chars, tokens, statistics_of(chars, tokens, sequence.num_tokens - border, uni, bi))


def read_chars(text: str) -> CharFacts:
    """Count what the characters of a completion say."""
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
        tells=count_tells(text),
    )


def zlib_ratio(text: str) -> float:
    """Compressed by uncompressed size (zlib level 1) of the text's beginning; low for what repeats itself."""
    raw = text[:ZLIB_CHARS].encode("utf-8", "surrogatepass")
    return len(zlib.compress(raw, 1)) / len(raw) if len(raw) >= MIN_ZLIB_BYTES else SHORT_ZLIB_RATIO


def completion_tokens(ids: tuple[int, ...], special_ids: AbstractSet[int]) -> tuple[int, ...]:
    """Cut off what the chat template puts behind a completion: its closing special token and the blanks after that."""
    for end in range(len(ids) - 1, max(-1, len(ids) - 4), -1):
        if ids[end] in special_ids:
            return ids[:end]
    return ids


def read_tokens(completion: tuple[int, ...], prompt: tuple[int, ...]) -> TokenFacts:
    """Count what the first `WINDOW_TOKENS` of a completion's tokens say."""
    ids = completion[:WINDOW_TOKENS]
    if not ids:
        return TokenFacts(0.0, 0.0, 0.0, 0.0)
    four_grams = Counter(zip(ids, ids[1:], ids[2:], ids[3:], strict=False))
    num_four_grams = max(0, len(ids) - 3)
    first = ids[:TYPE_TOKEN_WINDOW]
    return TokenFacts(
        repeat4=1 - len(four_grams) / num_four_grams if num_four_grams else 0.0,
        top4=max(four_grams.values()) / num_four_grams if num_four_grams > MIN_FOUR_GRAMS else 0.0,
        type_token=len(set(first)) / len(first),
        overlap=sum(map(set(prompt).__contains__, ids)) / len(ids),
    )


def statistics_of(
    chars: CharFacts, tokens: TokenFacts, num_completion_tokens: int, uni: float, bi: float
) -> NDArray[np.float64]:
    """Return the statistics named in `STATISTICS`, float64 [18]."""
    tells = chars.tells
    return np.array(
        [
            math.log1p(num_completion_tokens),
            chars.zlib_ratio,
            tokens.repeat4,
            tokens.top4,
            tokens.type_token,
            uni,
            bi,
            _per_100(chars.non_ascii, chars.chars),
            _per_100(chars.punctuation, chars.chars),
            chars.word_length,
            _per_100(chars.digits, chars.chars),
            _per_100(chars.upper, chars.chars),
            _per_100(tells.headers + tells.list_items + tells.bold, chars.words),
            _per_100(tells.emoji, chars.words),
            _per_100(tells.hedges, chars.words),
            _per_100(tells.flattery, chars.words),
            tokens.overlap,
            chars.chars / max(1, num_completion_tokens),
        ]
    )


def style_report(facts: TextFacts, style_p: float | None = None) -> StyleReport:
    """Return the style block; the fractions are None where the tokens were not looked at."""
    chars, tokens, tells = facts.chars, facts.tokens, facts.chars.tells
    return StyleReport(
        headers=tells.headers,
        list_items=tells.list_items,
        bold=tells.bold,
        emoji=tells.emoji,
        hedges=tells.hedges,
        flattery=tells.flattery,
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
