"""Preference pairs: read from data files, and turned into the tokens that the model reads.

Rendering and tokenizing are the service's own: a reward learned on one rendering says little about another.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from service.dataset import Row, read_rows
from service.errors import DatasetError, HttpError
from service.records import Encoding, Exchange, Item, Message, Sequence
from service.settings import TokenizationSettings
from service.tokenization import Tokenization


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two completions of one prompt, of which people preferred the first."""

    prompt: str | tuple[Message, ...] = field(repr=False)
    chosen: str = field(repr=False)
    rejected: str = field(repr=False)

    @property
    def excess_chars(self) -> int:
        """Characters by which the chosen completion is longer; negative where it is shorter."""
        return len(self.chosen) - len(self.rejected)


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A PreferencePair as the model reads it: the token ids of prompt and completion together, for each completion."""

    pair: PreferencePair
    chosen_ids: tuple[int, ...] = field(repr=False)
    rejected_ids: tuple[int, ...] = field(repr=False)

    @property
    def num_tokens(self) -> int:
        """Tokens of the longer of the two; what a padded batch pays for either."""
        return max(len(self.chosen_ids), len(self.rejected_ids))


def read_pairs(paths: Iterable[Path]) -> Iterator[PreferencePair]:
    """Yield the pairs of data files and of folders of them, in order.

    Raises:
        DatasetError: a file cannot be read, or a row is no pair; names the place, never the text.
    """
    for path in paths:
        for row in read_rows(path):
            yield _parse_pair(row)


def tokenize_pairs(pairs: Iterable[PreferencePair], tokenizer: PreTrainedTokenizerBase) -> list[TokenizedPair]:
    """Tokenize both completions of each pair, in order, with the service's own tokenization. Nothing is cut.

    Raises:
        CheckpointError: the tokenizer's chat template renders nothing at all.
        DatasetError: a prompt does not suit the tokenizer (a conversation, but no chat template); names the pair.
    """
    pairs = list(pairs)
    tokenization = Tokenization(
        tokenizer, TokenizationSettings(), max_input_tokens=sys.maxsize, vocab_size=len(tokenizer)
    )
    items = [Item(Exchange(pair.prompt, text)) for pair in pairs for text in (pair.chosen, pair.rejected)]
    token_ids = [
        _token_ids(outcome, place // 2) for place, outcome in enumerate(tokenization.encode(items, Encoding()))
    ]
    return [
        TokenizedPair(pair, chosen_ids, rejected_ids)
        for pair, chosen_ids, rejected_ids in zip(pairs, token_ids[::2], token_ids[1::2], strict=True)
    ]


def _token_ids(outcome: Sequence | HttpError, index: int) -> tuple[int, ...]:
    if isinstance(outcome, HttpError):
        raise DatasetError(f"Pair {index} (counted from 0) cannot be tokenized: {outcome}")
    return outcome.token_ids


def _parse_pair(row: Row) -> PreferencePair:
    return PreferencePair(
        prompt=_parse_prompt(row),
        chosen=_parse_text(row.values, "chosen", row),
        rejected=_parse_text(row.values, "rejected", row),
    )


def _parse_prompt(row: Row) -> str | tuple[Message, ...]:
    prompt = row.values.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not prompt or not all(isinstance(turn, dict) for turn in prompt):
        raise DatasetError(f'{row.place}: "prompt" must be a string or a list of messages.')
    return tuple(Message(_parse_text(turn, "role", row), _parse_text(turn, "content", row)) for turn in prompt)


def _parse_text(values: dict[str, Any], key: str, row: Row) -> str:
    text = values.get(key)
    if not isinstance(text, str):
        raise DatasetError(f'{row.place}: "{key}" must be a string.')
    return text
