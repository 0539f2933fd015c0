"""Statistics of a completion's characters and token ids, computed without the model.

The statistics that reward hacks change, and the counts of the style block. They are computed in the
tokenizer's threads, so the work is done by built-ins that are implemented in C. Which values are unusual is decided by
the detectors.
"""

from __future__ import annotations

import math
import string
import zlib
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.lexicon import FENCED_CODE, StyleMarkers, count_style_markers
from service.diagnostics.ngrams import NgramCounts, Surprisal
from service.diagnostics.phrasing import Wording, read_wording, words_of
from service.diagnostics.split_text import SplitText, split_text
from service.diagnostics.token_facts import PromptTokens, TokenFacts, completion_tokens, read_tokens
from service.diagnostics.word_sets import count
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

_READ_TOGETHER = 32
"""Completions whose tokens are looked up at once."""

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
        return self.read_all([(item, sequence)], full=full)[0]

    def read_all(self, items: Sequence[tuple[Item, TokenSequence]], *, full: bool) -> list[TextFacts | None]:
        """Return what `read` does of each item; what completions share, prompts and arrays, is made once."""
        found: list[TextFacts | None] = []
        prompts = _Prompts()
        for start in range(0, len(items), _READ_TOGETHER):
            chunk = [_Completion.of(*item, self._special_ids) for item in items[start : start + _READ_TOGETHER]]
            known = [completion for completion in chunk if completion is not None]
            facts = iter(self._read_full(known, prompts) if full else [_read_basic(one, prompts) for one in known])
            found += [None if completion is None else next(facts) for completion in chunk]
        return found

    def _read_full(self, completions: Sequence[_Completion], prompts: _Prompts) -> list[TextFacts]:
        surprisals: Sequence[Surprisal | None] = [None] * len(completions)
        if self._ngrams is not None:
            surprisals = self._ngrams.surprisals_of([completion.own_tokens for completion in completions])
        return [_read_full(*one, prompts) for one in zip(completions, surprisals, strict=True)]


@dataclass(frozen=True, slots=True)
class _Completion:
    """A completion and its prompt."""

    content: Exchange
    prompt_tokens: tuple[int, ...]

    own_tokens: tuple[int, ...]
    """Without what the chat template appends."""

    num_tokens: int
    """With what the chat template appends."""

    @classmethod
    def of(cls, item: Item, sequence: TokenSequence, special_ids: AbstractSet[int]) -> _Completion | None:
        """Return the completion of an item; None where prompt and completion cannot be separated."""
        num_prompt = sequence.num_prompt_tokens
        if not isinstance(item.content, Exchange) or num_prompt is None:
            return None
        own_tokens = completion_tokens(sequence.token_ids[num_prompt:], special_ids)
        return cls(item.content, sequence.token_ids[:num_prompt], own_tokens, sequence.num_tokens - num_prompt)


class _Prompts:
    """What was computed of prompts, for the other completions of the same request."""

    def __init__(self) -> None:
        self._tokens: dict[tuple[int, ...], PromptTokens] = {}
        self._words: dict[str, frozenset[bytes]] = {}

    def tokens(self, ids: tuple[int, ...]) -> PromptTokens:
        found = self._tokens.get(ids)
        if found is None:
            found = self._tokens[ids] = PromptTokens(ids)
        return found

    def words(self, text: str) -> frozenset[bytes]:
        found = self._words.get(text)
        if found is None:
            found = self._words[text] = words_of(text)
        return found


def _read_basic(completion: _Completion, prompts: _Prompts) -> TextFacts:
    split = split_text(completion.content.completion_text)
    chars = read_chars(split)
    return TextFacts(chars, wording=_wording_of(completion.content, split, chars, prompts))


def _read_full(completion: _Completion, surprisal: Surprisal | None, prompts: _Prompts) -> TextFacts:
    split = split_text(completion.content.completion_text)
    chars = read_chars(split)
    tokens = read_tokens(completion.own_tokens, prompts.tokens(completion.prompt_tokens))
    if surprisal is None:
        return TextFacts(chars, tokens, wording=_wording_of(completion.content, split, chars, prompts))
    statistics = statistics_of(chars, tokens, read_words(split), surprisal, completion.num_tokens)
    wording = _wording_of(completion.content, split, chars, prompts, surprisal.bi)
    return TextFacts(chars, tokens, statistics, wording)


def read_chars(split: SplitText) -> CharFacts:
    """Return the character statistics of a completion."""
    text, ascii_only = split.text, split.ascii_only
    num_runs = len(split.words)
    if "\u2019" in text:  # which is part of a word, and not of a run of ASCII letters
        num_runs = len(text.encode("ascii", "replace").translate(_BLANK_UNLESS_LETTER).split())
    prose = FENCED_CODE.sub("", text) if "```" in text else text
    return CharFacts(
        chars=len(text),
        words=len(prose.split()),
        non_ascii=len(text) - len(ascii_only),
        punctuation=count(ascii_only, _PUNCTUATION),
        digits=count(ascii_only, _DIGITS),
        upper=count(ascii_only, _UPPER),
        word_length=count(ascii_only, _LETTERS) / num_runs if num_runs else 0.0,
        zlib_ratio=zlib_ratio(text),
        markers=count_style_markers(text),
    )


def zlib_ratio(text: str) -> float:
    """Return compressed over uncompressed size (zlib level 1) of the first `ZLIB_CHARS`; low for repetitive text."""
    raw = text[:ZLIB_CHARS].encode("utf-8", "surrogatepass")
    return len(zlib.compress(raw, 1)) / len(raw) if len(raw) >= MIN_ZLIB_BYTES else SHORT_ZLIB_RATIO


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


def wording_of(content: Exchange) -> Wording:
    """Return how a completion is worded, compared with the last turn of its prompt."""
    split = split_text(content.completion_text)
    return _wording_of(content, split, read_chars(split), _Prompts())


def _wording_of(
    content: Exchange, split: SplitText, chars: CharFacts, prompts: _Prompts, surprisal: float = math.nan
) -> Wording:
    prompt = content.prompt
    question = prompts.words(prompt if isinstance(prompt, str) else prompt[-1].text)
    return read_wording(split, question, chars.markers, hash((prompt, content.tools)), surprisal)


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


def _per_100(count: int, total: int) -> float:
    return math.log1p(100 * count / max(1, total))
