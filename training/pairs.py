"""Preference pairs as the model reads them: rendered, tokenized and, where they are too long, shortened.

Rendering and tokenizing are the service's own: a reward learned on one rendering says little about another.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from service.errors import DatasetError, HttpError
from service.records import Encoding, Exchange, Item, TokenSequence
from service.settings import TokenizationSettings
from service.tokenization import Tokenization
from training.preferences import PreferencePair


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A PreferencePair as the model reads it: the token ids of prompt and completion together, for each completion.

    ``num_dropped_turns``: oldest turns of the prompt that the ids leave out; the pair itself is always whole.
    """

    pair: PreferencePair
    chosen_ids: tuple[int, ...] = field(repr=False)
    rejected_ids: tuple[int, ...] = field(repr=False)
    num_dropped_turns: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the longer of the two; what a padded batch pays for either."""
        return max(len(self.chosen_ids), len(self.rejected_ids))


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


def shorten_prompts(
    pairs: Iterable[TokenizedPair], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[TokenizedPair]:
    """Leave out the oldest exchanges (two turns each) of the prompts of long pairs until the pairs fit, in order.

    The last turn always stays, so a pair may stay too long. Completions are never touched.

    Raises:
        CheckpointError, DatasetError: see `tokenize_pairs`.
    """
    shortened = list(pairs)
    num_turns = 2
    while places := [n for n, pair in enumerate(shortened) if _may_lose_turns(pair, num_turns, max_length)]:
        rest = tokenize_pairs([_without_oldest(shortened[place].pair, num_turns) for place in places], tokenizer)
        for place, short in zip(places, rest, strict=True):
            shortened[place] = replace(short, pair=shortened[place].pair, num_dropped_turns=num_turns)
        num_turns += 2
    return shortened


def _may_lose_turns(pair: TokenizedPair, num_turns: int, max_length: int) -> bool:
    prompt = pair.pair.prompt
    return pair.num_tokens > max_length and not isinstance(prompt, str) and num_turns < len(prompt)


def _without_oldest(pair: PreferencePair, num_turns: int) -> PreferencePair:
    return replace(pair, prompt=pair.prompt[num_turns:])


def _token_ids(outcome: TokenSequence | HttpError, index: int) -> tuple[int, ...]:
    if isinstance(outcome, HttpError):
        raise DatasetError(f"Pair {index} (counted from 0) cannot be tokenized: {outcome}")
    return outcome.token_ids
