"""Preference pairs as the model reads them: rendered, tokenized and, where they are too long, shortened.

Rendering and tokenization are those of the service, because a reward learned on one rendering is not valid for another.
Pairs that cannot be tokenized, such as conversations with a system message under a chat template that refuses it, are
left out and counted by reason, and so are pairs whose completions are not one text each.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from service.data.reading import Tell
from service.errors import CheckpointError, DatasetError, HttpError
from service.records import PLAIN_INPUTS, Encoding, Exchange, Item, ModelInputs, TokenSequence
from service.settings import TokenizationSettings
from service.tokenization import Tokenization
from training.failures import count_reasons, describe_reasons, reason_of
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


@dataclass(frozen=True, slots=True)
class RefusedPair:
    """A PreferencePair that cannot be tokenized."""

    pair: PreferencePair

    reason: str
    """See `training.failures.reason_of`."""


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
        DatasetError: the tokenizer cannot render a prompt (a conversation without a chat template), or a completion is
            not one text; names file and row.
    """
    outcomes = _tokenize(pairs, tokenizer, inputs)
    for outcome in outcomes:
        if isinstance(outcome, RefusedPair):
            raise DatasetError(f"{_location(outcome)} cannot be tokenized: {outcome.reason}.")
    return _tokenized(outcomes)


def tokenize_usable_pairs(
    pairs: Iterable[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    inputs: ModelInputs = PLAIN_INPUTS,
    tell: Tell | None = None,
) -> list[TokenizedPair]:
    """Tokenize pairs as `tokenize_pairs` does, and leave out those that cannot be tokenized.

    Args:
        pairs: to tokenize.
        tokenizer: of the model.
        inputs: what the model reads.
        tell: called with the reasons and counts of pairs that are left out, if there are any.

    Raises:
        CheckpointError: see `tokenize_pairs`.
        DatasetError: no pair can be tokenized; names the reasons, and file and row of the first pair.
    """
    outcomes = _tokenize(pairs, tokenizer, inputs)
    refused = [outcome for outcome in outcomes if isinstance(outcome, RefusedPair)]
    if refused:
        reasons = describe_reasons(count_reasons(outcome.reason for outcome in refused))
        told = f"{len(refused):,} of {len(outcomes):,} pairs cannot be tokenized ({reasons}); the first is "
        told += f"{_location(refused[0])}."
        if len(refused) == len(outcomes):
            raise DatasetError(told)
        if tell is not None:
            tell(f"Left out: {told}")
    return _tokenized(outcomes)


def _tokenized(outcomes: Iterable[TokenizedPair | RefusedPair]) -> list[TokenizedPair]:
    return [outcome for outcome in outcomes if isinstance(outcome, TokenizedPair)]


def _location(refused: RefusedPair) -> str:
    return refused.pair.location or refused.pair.id or "A pair"


def _tokenize(
    pairs: Iterable[PreferencePair], tokenizer: PreTrainedTokenizerBase, inputs: ModelInputs
) -> list[TokenizedPair | RefusedPair]:
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
    encoded = tokenization.encode(items, Encoding())
    return [_outcome(pair, *both) for pair, *both in zip(pairs, encoded[::2], encoded[1::2], strict=True)]


def shorten_prompts(
    pairs: Iterable[TokenizedPair],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    inputs: ModelInputs = PLAIN_INPUTS,
) -> list[TokenizedPair]:
    """Leave out the oldest exchanges (two messages each) of long pairs' prompts until the pairs fit; keep the order.

    The last message is never left out, so a pair may still be too long. Completions are never changed. A rest of a
    conversation that the chat template refuses is not used.

    Raises:
        CheckpointError: see `tokenize_pairs`.
    """
    shortened = list(pairs)
    num_turns = 2
    while indices := [n for n, pair in enumerate(shortened) if _may_lose_turns(pair, num_turns, max_length)]:
        shorter = [_without_oldest(shortened[index].pair, num_turns) for index in indices]
        rest = _tokenize(shorter, tokenizer, inputs)
        for index, short in zip(indices, rest, strict=True):
            if isinstance(short, TokenizedPair):
                shortened[index] = replace(short, pair=shortened[index].pair, num_dropped_turns=num_turns)
        num_turns += 2
    return shortened


def _may_lose_turns(pair: TokenizedPair, num_turns: int, max_length: int) -> bool:
    prompt = pair.pair.prompt
    return pair.num_tokens > max_length and not isinstance(prompt, str) and num_turns < len(prompt)


def _without_oldest(pair: PreferencePair, num_turns: int) -> PreferencePair:
    return replace(pair, prompt=pair.prompt[num_turns:])


def _outcome(
    pair: PreferencePair, chosen: TokenSequence | HttpError, rejected: TokenSequence | HttpError
) -> TokenizedPair | RefusedPair:
    if not pair.has_texts:
        return RefusedPair(pair, "a completion is not one assistant message of text")
    if isinstance(chosen, HttpError):
        return RefusedPair(pair, reason_of(chosen.code, chosen.detail))
    if isinstance(rejected, HttpError):
        return RefusedPair(pair, reason_of(rejected.code, rejected.detail))
    return TokenizedPair(pair, chosen.token_ids, rejected.token_ids)
