"""Preference pairs as the model reads them: rendered, tokenized and, where they are too long, shortened.

Rendering and tokenization are those of the service, because a reward learned on one rendering is not valid for another.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from service.errors import CheckpointError, DatasetError, HttpError
from service.records import PLAIN_INPUTS, Encoding, Exchange, Item, ModelInputs, TokenSequence
from service.settings import TokenizationSettings
from service.tokenization import Tokenization
from training.preferences import PreferencePair


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A PreferencePair with the token ids of prompt and completion, for each of its completions."""

    pair: PreferencePair
    """The texts, always whole."""

    chosen_ids: tuple[int, ...] = field(repr=False)
    rejected_ids: tuple[int, ...] = field(repr=False)

    num_dropped_turns: int = 0
    """Messages at the start of the prompt that the token ids leave out."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the longer sequence; both have this length in a padded batch."""
        return max(len(self.chosen_ids), len(self.rejected_ids))


def tokenize_pairs(
    pairs: Iterable[PreferencePair], tokenizer: PreTrainedTokenizerBase, inputs: ModelInputs = PLAIN_INPUTS
) -> list[TokenizedPair]:
    """Tokenize both completions of each pair, in order, with the service's tokenization. Nothing is truncated.

    Args:
        pairs: any number.
        tokenizer: of the model.
        inputs: what the model reads, which decides with the tokenizer how text becomes token ids.

    Raises:
        CheckpointError: the tokenizer's chat template renders an empty text or leaves the completion out; or the model
            reads token types, which are not trained.
        DatasetError: the tokenizer cannot render a prompt (a conversation without a chat template); names the pair.
    """
    pairs = list(pairs)
    tokenization = Tokenization(
        tokenizer, TokenizationSettings(), max_input_tokens=sys.maxsize, vocab_size=len(tokenizer), inputs=inputs
    )
    if tokenization.reads_token_types and tokenization.rule.template == "pair":
        raise CheckpointError(
            "The model reads prompt and completion as a pair of texts with token types, which this command does not "
            "pass on: take a model with a chat template, or one without token types."
        )
    items = [Item(Exchange(pair.prompt, text, pair.tools)) for pair in pairs for text in (pair.chosen, pair.rejected)]
    token_ids = [
        _token_ids(outcome, index // 2) for index, outcome in enumerate(tokenization.encode(items, Encoding()))
    ]
    return [
        TokenizedPair(pair, chosen_ids, rejected_ids)
        for pair, chosen_ids, rejected_ids in zip(pairs, token_ids[::2], token_ids[1::2], strict=True)
    ]


def shorten_prompts(
    pairs: Iterable[TokenizedPair],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    inputs: ModelInputs = PLAIN_INPUTS,
) -> list[TokenizedPair]:
    """Leave out the oldest exchanges (two messages each) of long pairs' prompts until the pairs fit; keep the order.

    The last message is never left out, so a pair may still be too long. Completions are never changed.

    Raises:
        CheckpointError, DatasetError: see `tokenize_pairs`.
    """
    shortened = list(pairs)
    num_turns = 2
    while indices := [n for n, pair in enumerate(shortened) if _may_lose_turns(pair, num_turns, max_length)]:
        shorter = [_without_oldest(shortened[index].pair, num_turns) for index in indices]
        rest = tokenize_pairs(shorter, tokenizer, inputs)
        for index, short in zip(indices, rest, strict=True):
            shortened[index] = replace(short, pair=shortened[index].pair, num_dropped_turns=num_turns)
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
