"""Preference pairs: read from data files, told apart by hold-out, and turned into the tokens that the model reads.

No torch here. A completion is rendered exactly as the service renders it, because a reward learned on one rendering
says little about another.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.dataset import Row, read_rows
from service.errors import CheckpointError, DatasetError
from service.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    """Yield the pairs of data files, in order.

    Raises:
        DatasetError: a file cannot be read, or a row is no pair; names the place, never the text.
    """
    for path in paths:
        for row in read_rows(path):
            yield _parse_pair(row)


def balance_lengths(pairs: Sequence[PreferencePair], seed: int) -> list[PreferencePair]:
    """Leave pairs out at random until the longer completion wins as often as the shorter one; the order is kept.

    Length is the easiest thing to learn from preferences (Singhal et al. 2023, "A Long Way to Go"). In balanced pairs
    it does not tell which completion was chosen.
    """
    longer_wins = [index for index, pair in enumerate(pairs) if pair.excess_chars > 0]
    shorter_wins = [index for index, pair in enumerate(pairs) if pair.excess_chars < 0]
    surplus = len(longer_wins) - len(shorter_wins)
    left_out = set(random.Random(seed).sample(longer_wins if surplus > 0 else shorter_wins, abs(surplus)))  # noqa: S311 - a reproducible draw, not a secret
    return [pair for index, pair in enumerate(pairs) if index not in left_out]


def tokenize_pair(pair: PreferencePair, tokenizer: PreTrainedTokenizerBase) -> TokenizedPair:
    """Render both completions as the service does, and tokenize them. Nothing is cut.

    Raises:
        CheckpointError: the prompt is a conversation and the tokenizer has no chat template.
    """
    return TokenizedPair(
        pair,
        chosen_ids=_token_ids(pair.prompt, pair.chosen, tokenizer),
        rejected_ids=_token_ids(pair.prompt, pair.rejected, tokenizer),
    )


def _token_ids(prompt: str | tuple[Message, ...], completion: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    if tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            raise CheckpointError("The tokenizer has no chat template; prompts must be plain strings, not conversations.")
        return tuple(tokenizer(prompt + completion)["input_ids"])
    turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    conversation = [{"role": turn.role, "content": turn.content} for turn in (*turns, Message("assistant", completion))]
    return tuple(tokenizer.apply_chat_template(conversation, return_dict=True)["input_ids"])


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
