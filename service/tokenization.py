"""Turns Items into TokenSequences: chat templates, special tokens and truncation.

The token ids must be those of training, or every reward is wrong. So this follows TRL and transformers exactly: a
conversation is rendered by the model's chat template and gets no further special tokens; a plain text gets the special
tokens that the tokenizer puts in front of it. A special token written out in a text becomes that token, as in training.
Nothing is appended to a decoder's text, because the reward is read at the last token: for a model that was trained on
plain texts with EOS at the end (as TRL does), the caller writes the EOS into the completion.

No call changes any state, so several threads may encode at once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from math import ceil
from typing import Any, assert_never

from reward_client.options import TemplateChoice, Truncation

from service.errors import CheckpointError, HttpError, InvalidRequest, SequenceTooLong, SettingsError
from service.records import (
    Encoding,
    Exchange,
    Item,
    Message,
    TemplatedText,
    TokenIds,
    TokenSequence,
)
from service.settings import TokenizationSettings

SAMPLE_PROMPT = "What does a reward model do?"
SAMPLE_COMPLETION = "It reads a prompt with its answer and says, as one number, how much people would like that answer."
SAMPLE = Item(Exchange(SAMPLE_PROMPT, SAMPLE_COMPLETION))
"""A fixed item; its token ids show whether two services tokenize in the same way."""


@dataclass(frozen=True, slots=True)
class _Text:
    """The text of one item, ready for the tokenizer."""

    text: str = field(repr=False)

    add_special_tokens: bool
    """Whether it gets the special tokens that the tokenizer puts around a plain text."""

    prompt_chars: int | None = None
    """Characters before the completion; None where unknown."""

    completion_chars: int | None = None
    """Characters of the completion; None where unknown."""


class Tokenization:
    """Encodes Items for one model.

    Args:
        tokenizer: a fast tokenizer of transformers; it is not changed.
        settings: the defaults of the service.
        max_input_tokens: maximal length of a TokenSequence.
        vocab_size: rows of the embedding; token ids that callers send must be less.

    ``sample_token_ids`` are the ids of ``SAMPLE`` with the default settings.

    Raises:
        SettingsError: the chat template is set as default, but the tokenizer has none.
        CheckpointError: the chat template cannot render one user turn and one assistant turn.
    """

    def __init__(
        self, tokenizer: Any, settings: TokenizationSettings, *, max_input_tokens: int, vocab_size: int
    ) -> None:
        if settings.template == "chat" and not tokenizer.chat_template:
            raise SettingsError("tokenization.template is chat, but the tokenizer has no chat template: set concat.")
        self._tokenizer = tokenizer
        self._backend = _private_backend(tokenizer)
        self._prefix, self._suffix = _special_tokens_around_text(tokenizer, self._backend)
        self._leading_special_ids = {tokenizer.bos_token_id, *self._prefix}
        self._default_template: TemplateChoice = settings.template or ("chat" if tokenizer.chat_template else "concat")
        self._max_input_tokens = max_input_tokens
        self._vocab_size = vocab_size
        self.sample_token_ids = self._encode_sample()
        self._tokens_per_char, self._extra_tokens = self._measure_sample()

    @property
    def special_tokens(self) -> frozenset[str]:
        """The texts of the tokenizer's special tokens."""
        added = self._tokenizer.added_tokens_decoder.values()
        return frozenset(token.content for token in added if token.special)

    def template_for(self, encoding: Encoding) -> TemplateChoice:
        """Return how a prompt that is a plain string is rendered with this encoding."""
        return encoding.template or self._default_template

    def encode(self, items: Sequence[Item], encoding: Encoding) -> list[TokenSequence | HttpError]:
        """Tokenize the items in one call of the tokenizer; an item that cannot be encoded yields its error.

        An Exchange whose prompt is a string becomes a user turn and an assistant turn of the chat template, or with
        ``concat`` the two strings joined. A prompt of messages is always rendered by the chat template. Joined strings
        and templated text get the tokenizer's BOS if ``add_bos`` is set and the text has none. Token ids are not
        changed.

        Truncation ``prompt_left`` drops the excess tokens from the left, after the BOS. It drops no token of the
        completion. In templated text it is unknown where the completion begins, so it may be cut into. Token ids are
        never truncated.

        Args:
            items: any number, zero included.
            encoding: the options of the request.

        Returns:
            One entry per item, in order: a TokenSequence, or one of
            InvalidRequest: messages without a chat template, or messages that it rejects; ids outside the vocabulary;
            no tokens at all.
            SequenceTooLong: more than ``max_input_tokens`` where truncation was not requested or is not possible.
        """
        prompts: dict[tuple[Message, ...], str] = {}
        prepared = [self._prepare(item, encoding, prompts) for item in items]
        texts = [entry.text for entry in prepared if isinstance(entry, _Text)]
        encoded = iter(self._encode_texts(texts))
        outcomes: list[TokenSequence | HttpError] = []
        for entry in prepared:
            match entry:
                case _Text():
                    outcomes.append(self._fit(self._sequence(entry, next(encoded)), encoding.truncation))
                case TokenIds():
                    outcomes.append(self._check_ids(entry))
                case HttpError():
                    outcomes.append(entry)
        return outcomes

    def _encode_texts(self, texts: list[str]) -> list[Any]:
        if len(texts) == 1:  # for a single text the batch call would start its thread pool
            return [self._backend.encode(texts[0], add_special_tokens=False)]
        return list(self._backend.encode_batch(texts, add_special_tokens=False))

    def estimate_tokens(self, items: Sequence[Item]) -> int:
        """Estimate the tokens of the items from their characters; at least one per item, exact for token ids.

        Used for admission: tokenizing requests that are then refused would make an overload expensive.
        """
        return sum(self._estimate(item) for item in items)

    def _estimate(self, item: Item) -> int:
        if isinstance(item.content, TokenIds):
            return max(1, len(item.content.ids))
        return max(1, self._extra_tokens + ceil(item.content.num_chars * self._tokens_per_char))

    def _prepare(
        self, item: Item, encoding: Encoding, prompts: dict[tuple[Message, ...], str]
    ) -> _Text | TokenIds | HttpError:
        content = item.content
        match content:
            case Exchange():
                return self._render_exchange(content, encoding, prompts)
            case TemplatedText():
                return _Text(content.text, add_special_tokens=encoding.add_bos)
            case TokenIds():
                return content
            case _:
                assert_never(content)

    def _render_exchange(
        self, exchange: Exchange, encoding: Encoding, prompts: dict[tuple[Message, ...], str]
    ) -> _Text | HttpError:
        prompt, completion = exchange.prompt, exchange.completion
        if isinstance(prompt, str):
            if self.template_for(encoding) == "concat":
                return _Text(prompt + completion, encoding.add_bos, len(prompt), len(completion))
            prompt = (Message("user", prompt),)
        if not self._tokenizer.chat_template:
            return InvalidRequest("The model has no chat template: the prompt must be a string, its template concat.")
        try:
            # The prompt rendered alone shows where the completion begins. Many items share a prompt: render it once.
            if prompt not in prompts:
                prompts[prompt] = self._render(prompt, open_ended=True)
            text = self._render((*prompt, Message("assistant", completion)), open_ended=False)
        except Exception as error:  # noqa: BLE001 - a template is a program and may raise anything
            # The message of the error may quote the conversation, so only its class is reported.
            return InvalidRequest(f"The model's chat template rejects these messages ({type(error).__name__}).")
        return _Text(text, False, _common_prefix_length(prompts[prompt], text), len(completion))

    def _render(self, messages: tuple[Message, ...], *, open_ended: bool) -> str:
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        return str(self._tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=open_ended))

    def _sequence(self, text: _Text, encoded: Any) -> TokenSequence:
        ids = tuple(encoded.ids)
        num_prompt_tokens = None if text.prompt_chars is None else _tokens_before(text.prompt_chars, encoded)
        if text.add_special_tokens and ids[: len(self._prefix)] != self._prefix:
            ids = self._prefix + ids
            if num_prompt_tokens is not None:
                num_prompt_tokens += len(self._prefix)
        if text.add_special_tokens and self._suffix and ids[-len(self._suffix) :] != self._suffix:
            ids += self._suffix
        return TokenSequence(ids, num_prompt_tokens, completion_chars=text.completion_chars)

    def _fit(self, sequence: TokenSequence, truncation: Truncation) -> TokenSequence | HttpError:
        ids, limit = sequence.token_ids, self._max_input_tokens
        if not ids:
            return InvalidRequest("The item has no tokens.")
        excess = len(ids) - limit
        if excess <= 0:
            return sequence
        if truncation == "error":
            return _too_long(len(ids), limit)
        num_leading = sum(1 for _ in takewhile(self._leading_special_ids.__contains__, ids))
        end_of_prompt = len(ids) if sequence.num_prompt_tokens is None else sequence.num_prompt_tokens
        if excess > end_of_prompt - num_leading:
            return SequenceTooLong(
                f"{len(ids):,} tokens; the limit is {limit:,}. "
                f"{len(ids) - end_of_prompt:,} of them are in the completion, which is never truncated."
            )
        return replace(
            sequence,
            token_ids=ids[:num_leading] + ids[num_leading + excess :],
            num_prompt_tokens=None if sequence.num_prompt_tokens is None else sequence.num_prompt_tokens - excess,
            num_dropped=excess,
        )

    def _check_ids(self, content: TokenIds) -> TokenSequence | HttpError:
        ids = content.ids
        if not ids:
            return InvalidRequest("The item has no tokens.")
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            index = next(index for index, token_id in enumerate(ids) if not 0 <= token_id < self._vocab_size)
            return InvalidRequest(f"The token id at index {index} is not in the vocabulary of {self._vocab_size:,}.")
        return TokenSequence(ids) if len(ids) <= self._max_input_tokens else _too_long(len(ids), self._max_input_tokens)

    def _encode_sample(self) -> tuple[int, ...]:
        prepared = self._prepare(SAMPLE, Encoding(), {})
        if not isinstance(prepared, _Text):
            raise CheckpointError(
                "The tokenizer's chat template cannot render one user turn and one assistant turn: "
                "correct it, or set tokenization.template to concat."
            )
        return self._sequence(prepared, self._backend.encode(prepared.text, add_special_tokens=False)).token_ids

    def _measure_sample(self) -> tuple[float, int]:
        """Return the tokens per character of plain text, and the tokens that the template adds to an item."""
        plain = SAMPLE_PROMPT + SAMPLE_COMPLETION
        num_tokens = len(self._backend.encode(plain, add_special_tokens=False))
        return num_tokens / len(plain), max(0, len(self.sample_token_ids) - num_tokens)


def _private_backend(tokenizer: Any) -> Any:
    """Return a copy of the Rust tokenizer, because transformers changes its padding and truncation in every call."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def _special_tokens_around_text(tokenizer: Any, backend: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that are put before a plain text, and after it.

    They are those that the tokenizer adds, with one exception. An encoder was trained on texts between CLS and SEP, so
    both are added. Any other token after the text (the EOS that some tokenizers add) would change the token at which
    the reward of a decoder is read, so it is left out.
    """
    encoded = backend.encode("a", add_special_tokens=True)
    num_before = sum(1 for _ in takewhile(bool, encoded.special_tokens_mask))
    num_after = sum(1 for _ in takewhile(bool, reversed(encoded.special_tokens_mask)))
    before, after = tuple(encoded.ids[:num_before]), tuple(encoded.ids[len(encoded) - num_after :])
    is_encoder = tokenizer.cls_token_id in before and tokenizer.sep_token_id in after
    return before, after if is_encoder else ()


def _common_prefix_length(prompt: str, text: str) -> int:
    """Return where the completion begins in a rendered conversation, by TRL's definition.

    That is the length of the common prefix of the whole text and the prompt rendered alone, with generation prompt.
    """
    if text.startswith(prompt):
        return len(prompt)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, text, strict=False)))


def _tokens_before(char: int, encoded: Any) -> int:
    """Count the tokens that end at or before a character; a token that spans it belongs to the completion."""
    return bisect_right(range(len(encoded)), char, key=lambda token: encoded.token_to_chars(token)[1])


def _too_long(num_tokens: int, limit: int) -> SequenceTooLong:
    return SequenceTooLong(f"{num_tokens:,} tokens; the limit is {limit:,}.")
